"""The manual is run: every ```python block of README.md, CONTRIBUTING.md and docs/, one process a page.

Blocks of a page share one namespace and run in order, in an empty folder, with warnings as errors.

    ```python                  is run; ```python title="swish.py" is written to that file instead
    ```text                    right after a block that is run: what it prints; `...` stands for anything
    ```bash                    is run if it starts with `rapydli `
    ```console, any other      is not run

A page runs as a script with a main guard, so that its blocks may start worker processes.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import rapydli_flow as rf
from rapydli_flow import errors, nn, optim
from rapydli_flow.cli import main as cli
from rapydli_flow.config import settings

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(`{3,})[ ]*([\w+-]*)[ ]*(.*)$")
TIMEOUT_S = 600
MARK = "\x1e"  # ends the output of a block

SCRIPT = '''"""A page of the manual as a script. Workers import it, and must not run it again."""

import json
import pathlib
import subprocess


def _run():
    for _kind, _line, _text in json.loads(pathlib.Path("blocks.json").read_text()):
        if _kind == "file":
            pathlib.Path(_line).write_text(_text)
        elif _kind == "bash":
            subprocess.run(["bash", "-e", "-c", _text], check=True)
        else:
            _file = pathlib.Path(f"line_{_line}.py")  # a file, so that tracebacks and inspect find the source
            _file.write_text(_text)
            exec(compile(_text, str(_file.absolute()), "exec"), globals())
        print("\\x1e", end="", flush=True)


if __name__ == "__main__":
    _run()
'''


@dataclass(frozen=True)
class Fenced:
    """A fenced block: its language, attributes, first line in the page, text."""

    language: str
    attributes: str
    line: int
    text: str

    @property
    def title(self) -> str:
        found = re.search(r'title="([^"]+)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Step:
    """Something to run, and what it prints (None: anything)."""

    kind: str
    line: int | str
    text: str
    expected: str | None = None


def fences(page: str) -> list[tuple[Fenced, bool]]:
    """The fenced blocks of a page, and whether nothing but blank lines lies before each since the last one."""
    found: list[tuple[Fenced, bool]] = []
    opened: tuple[str, str, str, int] | None = None
    lines: list[str] = []
    adjacent = False
    for number, line in enumerate(page.splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, lines = (fence[1], fence[2], fence[3], number + 1), []
        elif opened is not None and line.strip() == opened[0]:
            text = "".join(f"{part}\n" for part in lines)
            found.append((Fenced(opened[1], opened[2], opened[3], text), adjacent))
            opened, adjacent = None, True
        elif opened is not None:
            lines.append(line)
        elif line.strip():
            adjacent = False
    if opened is not None:
        raise ValueError(f"the block that begins at line {opened[3]} has no end")
    return found


def steps(page: str) -> list[Step]:
    """What a page does."""
    out: list[Step] = []
    runs = False
    for block, adjacent in fences(page):
        if block.language == "text" and runs and adjacent:
            last = out.pop()
            out.append(Step(last.kind, last.line, last.text, block.text))
        runs = False
        if block.language == "python" and block.title:
            out.append(Step("file", block.title, block.text))
        elif block.language == "python":
            out.append(Step("python", block.line, block.text))
            runs = True
        elif block.language == "bash" and block.text.startswith("rapydli "):
            out.append(Step("bash", block.line, block.text))
            runs = True
    return out


def run(todo: list[Step], folder: Path) -> list[str]:
    """Run the steps in ``folder``; what each printed. AssertionError with the page's own words if one fails."""
    (folder / "bin").mkdir()
    (folder / "cache").mkdir()
    kernels = settings().cache_dir / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "kernels").symlink_to(kernels)  # compiled once; tuning results stay apart
    command = folder / "bin" / "rapydli"
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -W error -c "from rapydli_flow.cli import main; main()" "$@"\n'
    )
    command.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    (work / "examples").symlink_to(ROOT / "examples")
    (work / "page.py").write_text(SCRIPT)
    (work / "blocks.json").write_text(json.dumps([(s.kind, s.line, s.text) for s in todo]))
    env = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "RAPYDLI_CACHE_DIR": str(folder / "cache"),
        "RAPYDLI_THREADS": "2",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "page.py"], cwd=work, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    printed = done.stdout.split(MARK)
    if done.returncode:
        at = todo[len(printed) - 1]
        raise AssertionError(f"the block at line {at.line} fails:\n{at.text}\n{printed[-1]}\n{done.stderr}")
    return printed[:-1]


def check(step: Step, printed: str) -> None:
    """What a block printed against what the page says."""
    if step.expected is None:
        return
    checker = doctest.OutputChecker()
    if not checker.check_output(step.expected, printed, doctest.ELLIPSIS):
        example = doctest.Example(step.text, step.expected)
        raise AssertionError(f"line {step.line}: {checker.output_difference(example, printed, doctest.REPORT_NDIFF)}")


def pages() -> list[Path]:
    """The pages on which there is something to run."""
    found = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
    return [page for page in found if steps(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.slow
def test_page(page: Path, tmp_path: Path) -> None:
    todo = steps(page.read_text(encoding="utf-8"))
    for step, printed in zip(todo, run(todo, tmp_path), strict=True):
        check(step, printed)


def test_pages_are_read_as_written() -> None:
    page = """
```python
print(1)
```

```text
1
```

Words.

```text
not an output
```

```python title="a.py"
x = 2
```

```bash
rapydli --version
```
```text
rapydli, version ...
```

```bash
pip install rapydli-flow
```

```console
rapydli train recipe.py
```
"""
    assert steps(page) == [
        Step("python", 3, "print(1)\n", "1\n"),
        Step("file", "a.py", "x = 2\n"),
        Step("bash", 21, "rapydli --version\n", "rapydli, version ...\n"),
    ]
    with pytest.raises(ValueError, match="begins at line 3 has no end"):
        steps("\n```python\nx = 1\n")


def test_a_page_that_is_wrong_fails(tmp_path: Path) -> None:
    todo = steps("```python\nprint(6 * 7)\n```\n```text\n43\n```\n")
    with pytest.raises(AssertionError, match="line 2"):
        check(todo[0], "42\n")
    with pytest.raises(AssertionError, match="block at line 2 fails"):
        run(steps("```python\nimport warnings\nwarnings.warn('x', UserWarning)\n```\n"), tmp_path)


def test_pictures_of_plans_are_what_plans_are_now(tmp_path: Path) -> None:
    images = ROOT / "docs" / "images"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(images / "parallel.py"), str(tmp_path)]
    subprocess.run(command, check=True, env=env, timeout=TIMEOUT_S)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    committed = {path.name: path.read_text(encoding="utf-8") for path in images.glob("parallel-*.svg")}
    assert sorted(drawn) == sorted(committed)
    different = [name for name, text in drawn.items() if committed[name] != text]
    assert different == [], "look at them, and draw them again: python docs/images/parallel.py"
    told = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    assert [name for name in drawn if f"(images/{name})" not in told] == []


def test_every_error_setting_and_command_is_in_the_manual() -> None:
    told = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = [k for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.RapydliError)]
    assert [name for name in classes if f"`{name}`" not in told] == []
    told = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    source = (ROOT / "rapydli_flow" / "config.py").read_text(encoding="utf-8")
    assert [name for name in sorted(set(re.findall(r"RAPYDLI_[A-Z_]+", source))) if f"`{name}`" not in told] == []
    told = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f"## rapydli {name}" not in told] == []
    for command in cli.commands.values():
        options = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        assert [name for name in options if name.startswith("--") and name not in told] == []


def test_every_public_name_is_in_the_reference() -> None:
    told = set(re.findall(r"\w+", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")))
    shown_by_module = {"__version__", "settings", "BestSnapshot", "EarlyStopping", "PlateauRate"}
    for package in (nn, optim, rf):
        assert [name for name in package.__all__ if name not in told | shown_by_module] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs rapydli-flow[docs]")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html"))
    loaded = re.findall(r"""<(?:script|img|iframe)[^>]+src=["']?(https?://[^"'\s>]+)""", pages)
    loaded += re.findall(r"""<link[^>]+href=["']?(https?://[^"'\s>]+)["']?[^>]+rel=["']?stylesheet""", pages)
    assert loaded == [], "the site must not load anything from elsewhere"
