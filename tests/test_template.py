"""Templates, configs, devices, epilogues and the registry where they meet."""

from dataclasses import replace
from typing import Any

import pytest

from rapydli_flow.errors import TemplateError
from rapydli_flow.ops import Relu
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, Scalar, Template, template, templates

DEVICE = Device("cpu", "a processor", target="skylake-1", vector_bytes=64)
X = Spec((4, 6))


def build(op: Any, ins: Any, outs: Any, epilogue: Any, **config: Any) -> Loop:
    return Loop(lambda *_: None, 1)


def made(space: dict[str, tuple[Any, ...]], **options: Any) -> Template:
    fits = options.pop("fits", None)
    return Template("test_family", "cpu", build, space, {"small": fits} if fits else {}, **options)


def small(op: Any, ins: Any, outs: Any, device: Any, *, rows: int, wide: bool) -> bool:
    return rows * (2 if wide else 1) <= 4


def test_device_key_tells_what_shares_kernels() -> None:
    assert DEVICE.key == "cpu-skylake-1-v64"
    assert Device("cpu", "a processor").key == "cpu-a processor-v32"
    assert DEVICE.key == Device("cpu", "renamed", target="skylake-1", cores=9, vector_bytes=64).key


def test_a_parameter_hides_a_limit_of_its_name() -> None:
    one = Template("test_family", "cpu", build, {"cores": (8, 64), "lanes": (4,)}, {"few": "cores * lanes < 100"})
    assert DEVICE.limits["cores"] == 1
    assert one.space_of(Relu(), (X,), (X,), DEVICE).columns()["cores"].tolist() == [8]
    assert one.default(Relu(), (X,), (X,), DEVICE) == {"cores": 8, "lanes": 4}


def test_configs_begin_with_the_default_and_are_those_that_fit() -> None:
    one = made({"rows": (2, 4, 8), "wide": (True, False)}, fits=small)
    configs = list(one.configs(Relu(), (X,), (X,), DEVICE))
    assert configs == [{"rows": 2, "wide": True}, {"rows": 2, "wide": False}, {"rows": 4, "wide": False}]
    assert one.default(Relu(), (X,), (X,), DEVICE) == configs[0]


def test_a_preferred_config_is_the_default_where_it_fits() -> None:
    space = {"rows": (2, 4, 8), "wide": (True, False)}
    good = made(space, fits=small, prefer=lambda *_: {"rows": 4, "wide": False})
    bad = made(space, fits=small, prefer=lambda *_: {"rows": 8, "wide": False})
    assert good.default(Relu(), (X,), (X,), DEVICE) == {"rows": 4, "wide": False}
    assert bad.default(Relu(), (X,), (X,), DEVICE) == {"rows": 2, "wide": True}
    assert next(good.configs(Relu(), (X,), (X,), DEVICE)) == {"rows": 4, "wide": False}
    assert len(list(good.configs(Relu(), (X,), (X,), DEVICE))) == 3


def test_a_template_that_fits_nothing_has_no_configs() -> None:
    one = made({"rows": (8,), "wide": (True,)}, fits=small)
    assert one.default(Relu(), (X,), (X,), DEVICE) is None
    assert list(one.configs(Relu(), (X,), (X,), DEVICE)) == []


def test_a_template_without_parameters_has_one_config() -> None:
    one = made({})
    assert list(one.configs(Relu(), (X,), (X,), DEVICE)) == [{}]
    assert one.workspace(Relu(), (X,), (X,)) == ()
    one.check(Relu(), (X,), (X,), DEVICE, {})


def test_check_refuses() -> None:
    one = made({"rows": (2, 8), "wide": (True,)}, fits=small)
    one.check(Relu(), (X,), (X,), DEVICE, {"rows": 2, "wide": True})
    message = r"template test_family/build has parameters \['rows', 'wide'\] but the config names \['rows'\]"
    with pytest.raises(TemplateError, match=message):
        one.check(Relu(), (X,), (X,), DEVICE, {"rows": 2})
    message = (
        r"template test_family/build does not fit f32\[4,6\] with {'rows': 8, 'wide': True}: "
        "it breaks the rule 'small'. List what fits"
    )
    with pytest.raises(TemplateError, match=message):
        one.check(Relu(), (X,), (X,), DEVICE, {"rows": 8, "wide": True})


def test_templates_register_under_a_family_and_a_later_one_replaces_its_name() -> None:
    @template("test_registry", "cpu", space={"rows": (1, 2)})
    def first(op: Any, ins: Any, outs: Any, epilogue: Any, *, rows: int) -> Loop:
        return build(op, ins, outs, epilogue)

    @template("test_registry", "cpu")
    def second(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
        return build(op, ins, outs, epilogue)

    assert [t.name for t in templates("test_registry", "cpu")] == ["first", "second"]
    template("test_registry", "cpu", space={"rows": (3,)})(first)
    known = templates("test_registry", "cpu")
    assert [(t.name, dict(t.space)) for t in known] == [("second", {}), ("first", {"rows": (3,)})]
    assert known[0].build is second
    assert "test_templates_register_under" in known[0].source()


def test_values_may_depend_on_the_device() -> None:
    space = {"blocks": lambda device: (device.cores, 0), "rows": (1, 2)}
    one = Template("test_family", "cpu", build, space, {"few": "blocks < 8 or rows == 2"})
    few, many = replace(DEVICE, cores=4), replace(DEVICE, cores=64)
    assert one.values(few) == {"blocks": (4, 0), "rows": (1, 2)}
    assert one.default(Relu(), (X,), (X,), few) == {"blocks": 4, "rows": 1}
    assert one.default(Relu(), (X,), (X,), many) == {"blocks": 64, "rows": 2}
    spaces = [one.space_of(Relu(), (X,), (X,), device) for device in (few, many)]
    assert [space.count() for space in spaces] == [4, 3]
    assert {"blocks": 64, "rows": 2} in spaces[1]
    assert {"blocks": 64, "rows": 2} not in spaces[0]


def test_families_without_templates_and_unknown_kinds() -> None:
    assert templates("no_such_family", "cpu") == ()
    with pytest.raises(TemplateError, match="no kernels for devices of kind 'tpu'; kinds are cpu, cuda"):
        templates("conv", "tpu")


def test_epilogue_reaches_extras_by_their_shape() -> None:
    out = Spec((2, 3, 5))
    none = Epilogue.none(out)
    assert none.identity
    one = Epilogue(Scalar(("v", "e0"), ("t0 = v + e0",), ("t0",)), (Spec((5,)),), out)
    assert not one.identity
    assert [one.reach(Spec(shape)) for shape in ((2, 3, 5), (5,), ())] == ["element", "channel", "scalar"]
    assert [one.reach(Spec(shape)) for shape in ((3, 5), (1,), (4, 3, 5))] == ["nowhere"] * 3
    assert replace(one, source=Spec((4, 3, 5))).reach(Spec((4, 3, 5))) == "source"
