"""``qpipe explain``: what becomes of a model, documentation of registered things, and of decisions."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...calibrate.errors import UsageError
from . import output
from .options import JSON


class _Group(click.Group):
    """A group that takes the path of a model for ``model PATH``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names, or `model` for the name of a file."""
        is_file = Path(args[0]).suffix == ".onnx" or Path(args[0]).is_file()
        return super().resolve_command(ctx, ["model", *args] if is_file and args[0] not in self.commands else args)


@click.group("explain", cls=_Group, short_help="Explain a model, scheme, method, target, operator, format or value.")
def command() -> None:
    """Explain a model: ``qpipe explain MODEL [NODE]`` says what becomes an integer kernel, and why not.

    Or what qpipe knows: schemes, methods, targets, operators, formats, values, and a saved plan.
    """


@command.command("model")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("node", required=False)
@click.option("--target", help="Deployment target; by default the one that the model was made for, else ort-cpu.")
@click.option("--scheme", help="Of a float model: named scheme that it would be quantized with; w8a8 by default.")
@click.option("--recipe", type=click.Path(path_type=Path), help="Of a float model: recipe (YAML) instead of a scheme.")
@click.option("--calib", type=click.Path(path_type=Path), help="Of a float model: statistics of qpipe calibrate.")
@click.option("--all", "every_node", is_flag=True, help="List every node, instead of groups of alike ones.")
@JSON
def model(model: Path, node: str | None, **given: Any) -> None:
    """Say what the target's runtime makes of MODEL, with evidence: will it fuse?

    A quantized model is handed to the runtime (ONNX Runtime's optimizer, OpenVINO's compiler; documented rules for
    others), and each node looked up in what comes out. A float model is quantized in memory first.
    """
    from ..graph import load
    from ..stages.explain import explain_float, explain_quantized, is_quantized
    from .explaining import print_model, print_node

    found = load(model)
    if is_quantized(found):
        explanation = explain_quantized(model, given["target"] or found.metadata.get("qpipe.target", "ort-cpu"))
    else:
        explanation = explain_float(model, _recipe(given), _statistics(model, given["calib"]))
    if node is None:
        print_model(model, explanation, given)
    else:
        print_node(model, explanation, node, given)


def _recipe(given: dict[str, Any]) -> Any:
    from ..recipe import load_recipe, make_recipe

    keys = load_recipe(given["recipe"]) if given["recipe"] else {}
    return make_recipe(**{**keys, **{k: given[k] for k in ("scheme", "target") if given[k]}})


def _statistics(model: Path, calib: Path | None) -> Any:
    if calib is None:
        return None
    from ..calibration import identify, load

    calibration = load(calib)
    calibration.check_model(identify(model), where=str(calib))
    return calibration


@command.command("scheme")
@click.argument("name", required=False)
@JSON
def scheme(name: str | None, as_json: bool) -> None:
    """Print the few lines of recipe that a scheme NAME is, and what it leaves in float; without NAME, list all."""
    import yaml

    from ..recipe import SCHEMES, make_recipe

    if name is None:
        data = {key: found.summary for key, found in SCHEMES.items()}
        known = {key: found.known_as for key, found in SCHEMES.items()}
        others = "; ".join(f"{key}: {', '.join(names)}" for key, names in known.items() if names)
        lines = output.table(["scheme", ""], [list(item) for item in data.items()])
        lines += ["", *textwrap.wrap(f"Known elsewhere as {others}.", 110)]
        output.emit({"schemes": data, "known_as": known}, as_json, lines)
        return
    recipe, found = make_recipe(scheme=name), SCHEMES[name]
    lines = yaml.safe_dump({"scheme": name, **found.keys}, sort_keys=False).splitlines()
    data = {
        "recipe": recipe.model_dump(mode="json"),
        "summary": found.summary,
        "in_float": found.in_float,
        "known_as": found.known_as,
    }
    remarks = [*textwrap.wrap(found.summary), *textwrap.wrap(f"In float: {found.in_float}.")]
    if found.known_as:
        remarks += textwrap.wrap(f"Known elsewhere as: {', '.join(found.known_as)}.")
    output.emit(data, as_json, [*(f"# {line}" for line in remarks), *lines])


@command.command("method")
@click.argument("name", required=False)
@JSON
def method(name: str | None, as_json: bool) -> None:
    """Print what a calibration method NAME does; without NAME, list all."""
    from ...calibrate.ranges import METHODS

    _describe(METHODS, name, as_json)


@command.command("target")
@click.argument("name", required=False)
@JSON
def target(name: str | None, as_json: bool) -> None:
    """Print what a target NAME wants; without NAME, list all."""
    from ..targets import TARGETS

    if name is None:
        output.emit(
            {"targets": TARGETS.names()},
            as_json,
            output.table(["target", ""], [[n, t.summary] for n, t in TARGETS.items()]),
        )
        return
    found = TARGETS.get(name)
    facts = {field: getattr(found, field) for field in found.__dataclass_fields__}
    facts = {k: _plain(v) for k, v in facts.items()}
    output.emit({"target": facts}, as_json, [f"{k:<22}{_text(v)}" for k, v in facts.items()])


@command.command("op")
@click.argument("name", required=False)
@JSON
def op(name: str | None, as_json: bool) -> None:
    """Print how an operator type NAME takes part; without NAME, list all."""
    from ..rules import RULES

    rows = [[n, r.kind, r.reason] for n, r in RULES.items()] if name is None else []
    if name is not None:
        rule = RULES.get(name)
        rows = [[name, rule.kind, rule.reason]]
    data = [{"op": n, "kind": k, "reason": r} for n, k, r in rows]
    output.emit({"operators": data}, as_json, output.table(["operator", "kind", "reason"], rows))


@command.command("format")
@click.argument("name", required=False)
@JSON
def number_format(name: str | None, as_json: bool) -> None:
    """Print the card of a number format NAME; without NAME, list all."""
    from ...calibrate import cards
    from ...calibrate.formats import FORMATS

    if name is None:
        output.emit({"formats": FORMATS.names()}, as_json, FORMATS.names())
        return
    card = cards.format_card(name)
    output.emit({"format": cards.as_data(card)}, as_json, cards.render(card).splitlines())


@command.command("value", context_settings={"ignore_unknown_options": True})
@click.argument("value", type=float)
@click.option("--format", "name", default="float32", show_default=True, help="Format whose bits are shown.")
@click.option("--scale", type=float, help="Scale of the codes, for all formats.")
@click.option(
    "--amax", type=float, help="Largest magnitude of the tensor, for scales of each format; VALUE without it."
)
@JSON
def value(value: float, name: str, scale: float | None, amax: float | None, as_json: bool) -> None:
    """Print the bits of VALUE, and its code and error in every format."""
    from ...calibrate import cards

    card = cards.value_card(value, name, scale=scale, amax=amax)
    output.emit({"value": cards.as_data(card)}, as_json, cards.render(card).splitlines())


@command.command("plan")
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("node", required=False)
@JSON
def plan(plan: Path, node: str | None, as_json: bool) -> None:
    """Print the decisions of a saved PLAN (qpipe quantize --save-plan), of one NODE or of all."""
    import json

    from ..patterns import near_names

    if not plan.is_file():
        raise UsageError("no such file", where=str(plan), expected="a plan written by qpipe quantize --save-plan")
    decisions = json.loads(plan.read_text(encoding="utf-8"))["decisions"]
    chosen = [d for d in decisions if node in (None, d["node"])]
    if not chosen:
        near = near_names(str(node), sorted({d["node"] for d in decisions}))
        raise UsageError("the plan has no such node", found=str(node), expected=", ".join(near))
    rows = [[d["node"], d["op"], d["slot"], d["tensor"], d["spec"] or "float", d["reason"]] for d in chosen]
    output.emit(
        {"decisions": chosen}, as_json, output.table(["node", "op", "slot", "tensor", "stored as", "reason"], rows)
    )


def _describe(registry: Any, name: str | None, as_json: bool) -> None:
    if name is None:
        rows = [[n, (inspect.getdoc(item) or "").splitlines()[0]] for n, item in registry.items()]
        data = [{"name": n, "summary": s} for n, s in rows]
        output.emit({registry.kind.replace(" ", "_"): data}, as_json, output.table(["name", ""], rows))
        return
    text = inspect.getdoc(registry.get(name)) or ""
    output.emit({"name": name, "text": text}, as_json, text.splitlines())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return sorted(value) if isinstance(value, frozenset) else value


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(inner)}" for key, inner in value.items())
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
