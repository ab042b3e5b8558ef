from __future__ import annotations

import pytest

from sluice.core.budget_spec import AllowedDrop, Bound, BudgetSpec, parse_budget
from sluice.core.errors import SluiceError


@pytest.mark.parametrize(
    ("spec", "ms"),
    [
        ("50%", 2.0),
        ("2.4ms", 2.4),
        (" 2.4 MS ", 2.4),
        ("800us", 0.8),
        ("0.003s", 3.0),
        ({"latency_ms": 2}, 2.0),
        ({"latency_ms": "25%"}, 1.0),
    ],
)
def test_milliseconds(spec: str | dict[str, str | float], ms: float) -> None:
    assert BudgetSpec.parse(spec).ms(4.0) == pytest.approx(ms)


@pytest.mark.parametrize(
    "spec",
    [
        0.5,
        "fast",
        "2.4",
        "-1ms",
        "-1.0",
        "-0",
        "-inf",
        "-nan",
        "--1",
        "-",
        "-5%",
        "120%",
        "0%",
        "nanms",
        {"params": "5%"},
        {},
        {"latency_ms": True},
    ],
)
def test_what_is_refused(spec: object) -> None:
    with pytest.raises(SluiceError, match=r"say '50%', '2\.4ms'"):
        BudgetSpec.parse(spec)  # type: ignore[arg-type]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(SluiceError, match=r"names \['params'\]; only 'latency_ms' is known"):
        BudgetSpec.parse({"latency_ms": "50%", "params": "5%"})


def test_equal_budgets_are_one_value() -> None:
    """However they are written; a share is not the milliseconds that it comes to."""
    one = BudgetSpec.parse("2.4ms")
    assert one == BudgetSpec.parse({"latency_ms": 2.4}) and len({one, BudgetSpec.parse(" 2.4 MS ")}) == 1
    assert one.bounds == (("latency_ms", Bound(2.4, "ms")),)
    assert one != BudgetSpec.parse("60%")


def test_the_text_says_kind_and_bound() -> None:
    assert [str(BudgetSpec.parse(spec)) for spec in ("50%", {"latency_ms": 2.4})] == ["latency 50%", "latency 2.4 ms"]


@pytest.mark.parametrize(("spec", "amount"), [("-1.0", 1.0), (" -.25", 0.25), ("-0", 0.0), ("-1e-3", 1e-3)])
def test_a_negative_number_without_a_unit_is_a_drop(spec: str, amount: float) -> None:
    assert parse_budget(spec) == AllowedDrop(amount) and str(amount)[0] != "-"
    with pytest.raises(
        SluiceError, match=rf"budget '{spec}' allows a drop of {amount:g}, which is for sluice.compress"
    ):
        BudgetSpec.parse(spec)


def test_everything_else_is_a_budget() -> None:
    assert parse_budget("50%") == BudgetSpec.parse("50%") and parse_budget({"latency_ms": 2}) == BudgetSpec.parse("2ms")
    for spec in ("-inf", "-1ms", "-5%", "1.0", -1.0):
        with pytest.raises(SluiceError, match="say '50%'"):
            parse_budget(spec)  # type: ignore[arg-type]
