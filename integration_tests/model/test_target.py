"""The matrices to be allocated, as shapes."""

import pytest

from optimum_dobisvd.model.target import Target


def test_target_knows_its_bytes_and_kind() -> None:
    target = Target("model.layers.0.self_attn.k_proj", 16, 64, 2)
    assert (target.dense_bytes, target.kind, Target("fc", 1, 1, 1).kind) == (2048, "k_proj", "fc")


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("field", ["out_features", "in_features", "element_size"])
def test_targets_refuse_bad_sizes(field: str, value: object) -> None:
    sizes = {"out_features": 4, "in_features": 4, "element_size": 2} | {field: value}
    with pytest.raises(ValueError, match=f"a.b: {field} is {value}; it must be a whole number of at least 1"):
        Target("a.b", **sizes)
