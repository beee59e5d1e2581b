"""Metric names and values of what only some trials have."""

from track_samples import ENERGY, ok, record, roofline

from openpi_opt.track.mlflow_content import metrics


def test_roofline_and_energy_are_metrics_where_they_are_known():
    without = metrics(record(ok(10.0)))
    result = ok(10.0).model_copy(update={"roofline": roofline(), "energy": ENERGY})
    found = metrics(record(result))
    assert {key: found[key] for key in set(found) - set(without)} == {
        "roofline/fraction": 0.4,
        "roofline/floor_ms": 4.0,
        "roofline/vision_fraction": 0.25,
        "roofline/vision_floor_ms": 1.0,
        "roofline/prefill_floor_ms": 3.0,
        "energy/seconds": 3.0,
        "energy/calls": 100.0,
        "energy/joule": 5.0,
        "energy/inferences_per_joule": 0.8,
        "energy/watt": 500.0,
        "energy/hz_per_watt": 0.25,
        "energy/idle_watt": 90.0,
        "energy/limit_watt": 700.0,
        "energy/hz_per_limit_watt": 0.2,
    }
