"""Pictures of runs: the report. Uses the API; nothing imports it, so Bokeh is loaded only where it is wanted."""
