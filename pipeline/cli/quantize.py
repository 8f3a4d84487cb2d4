"""``qpipe quantize``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...calibrate.errors import ThresholdError, UsageError
from . import output
from .options import CUSTOM_OPS, DEVICE, FORCE, HARDLINKS, INLINE, JSON, MAX_MEMORY, MODEL, QUIET, UPGRADE, data_options

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..estimate import Cost
    from ..graph import Model
    from ..plan import Decision, Plan
    from ..recipe import Recipe
    from ..stages.preview import Preview
    from ..stages.quantize import Quantized
    from ..workflow import Job


@click.command("quantize", short_help="Quantize a model.")
@MODEL
@click.option("-o", "--output", "output_path", type=click.Path(path_type=Path), help="File to write.")
@click.option("--calib", type=click.Path(path_type=Path), help="Statistics file of qpipe calibrate.")
@data_options
@click.option("--scheme", help="Named scheme, e.g. w8a8.")
@click.option("--target", help="Deployment target, e.g. ort-cpu, portable.")
@click.option("--method", help="Calibration method, e.g. minmax, percentile:99.99, mse, entropy, auto.")
@click.option("--weights", metavar="FORMAT", help="Format of weights, e.g. int8, int4, nf4, float8_e4m3fn, none.")
@click.option("--block", type=click.IntRange(min=1), help="Weights in blocks of so many inputs, one scale each.")
@click.option("--activations", metavar="FORMAT", help="Format of activations, e.g. uint8, int8, int16, none.")
@click.option("--float-type", help="Type of what stays float: float32, float16 or bfloat16.")
@click.option("--equalize", help="auto, none, smoothquant, smoothquant:0.75, awq; cross_layer needs --data.")
@click.option("--algorithm", help="Weight algorithm, e.g. rtn, rtn_mse, gptq, hqq.")
@click.option(
    "--bias-correction", is_flag=True, help="Take back in biases what quantizing adds on average; needs --data."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any recipe key, e.g. weights.format=int4.")
@click.option("--recipe", type=click.Path(path_type=Path), help="Recipe file (YAML); flags win over its keys.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize only nodes that match: glob, re:, op:.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave matching nodes in float.")
@click.option("--keep", multiple=True, type=click.Choice(["first", "last"]), help="Keep first or last layers in float.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what it will take, and stop.")
@click.option("--why", is_flag=True, help="List every node with the reason of its decision.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@click.option("--save-recipe", type=click.Path(path_type=Path), help="Write the recipe that all flags amount to.")
@UPGRADE
@INLINE
@CUSTOM_OPS
@click.option("--skip-nonfinite", is_flag=True, help="Leave layers whose weights are not finite in float.")
@click.option("--requantize", is_flag=True, help="Accept a model that is quantized in part.")
@MAX_MEMORY
@click.option("--calib-by-name", is_flag=True, help="Accept statistics of another model, matched by tensor names.")
@click.option("--require-quantized", is_flag=True, help="Write nothing and give exit code 1 when nothing is quantized.")
@HARDLINKS
@DEVICE
@FORCE
@JSON
@QUIET
def command(model: Path, output_path: Path | None, **given: Any) -> None:
    """Quantize MODEL. Without --calib, statistics are collected from --data first."""
    if output_path is None and not given["dry_run"]:
        raise UsageError("no output was named", expected="-o FILE, or --dry-run", do="qpipe quantize m.onnx -o q.onnx")
    from ..estimate import measured
    from ..graph import save
    from ..stages.preview import preview
    from ..stages.quantize import QuantizeOptions
    from .collecting import layer_data, open_job, shown

    start, recipe = time.monotonic(), _recipe(given)
    job = open_job(model, given)
    before, opened = _weight_bytes(job.model), time.monotonic()
    recipe, calibration = _statistics(job, recipe, given)
    collected = time.monotonic()
    folder = (output_path or model).absolute().parent
    data = layer_data(job, recipe, given)
    coming = preview(job.model, recipe, calibration, folder, opened - start, data)
    if given["require_quantized"] and recipe.float_type is None:
        _require_quantized(coming.plan)
    if given["dry_run"]:
        _save_side_files(coming.plan, recipe, given)
        sizes = (before, coming.cost.output_bytes)
        _report(coming, recipe, given, _Outcome(opset=job.model.opset, sizes=sizes, expected=coming.cost))
        return
    if not given["quiet"]:
        output.note(f"estimated: {_costs(coming.cost)}")
    with shown(data, given) as data:
        options = QuantizeOptions(skip_nonfinite=given["skip_nonfinite"], requantize=given["requantize"], data=data)
        result = job.quantize(recipe, calibration, options)
    if given["require_quantized"] and recipe.float_type is None:
        _require_quantized(result.plan)
    _save_side_files(result.plan, recipe, given)
    assert output_path is not None
    written = save(result.model, output_path, force=given["force"])
    took = measured(written, time.monotonic() - start - (collected - opened))
    sizes = (before, _weight_bytes(result.model))
    outcome = _Outcome(
        opset=result.model.opset, sizes=sizes, written=written, notes=result.notes, took=took, expected=coming.cost
    )
    _report(result, recipe, given, outcome)


def _require_quantized(plan: Plan) -> None:
    if not plan.coded():
        reasons = [f"{reason}: {n} nodes" for reason, n in _reasons(list(plan.nodes().values())).most_common(3)]
        raise ThresholdError(
            "nothing was quantized, and nothing was written",
            found="; ".join(reasons) or "a graph without nodes",
            expected="at least one quantized layer (--require-quantized)",
            do="qpipe quantize --dry-run lists every node with its reason",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What became of a model: nothing yet in a dry run."""

    opset: int
    sizes: tuple[int, int]
    expected: Cost
    written: list[Path] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    took: Cost | None = None


def _recipe(given: dict[str, Any]) -> Recipe:
    from ..recipe import load_recipe, make_recipe

    keys = load_recipe(given["recipe"]) if given["recipe"] else {}
    for name in ("scheme", "target", "method", "equalize", "float_type"):
        if given[name]:
            keys[name] = given[name]
    for name in ("include", "exclude", "keep"):
        if given[name]:
            keys[name] = tuple(given[name])
    for text in [*_short_settings(given), *given["settings"]]:
        _set(keys, text)
    return make_recipe(**keys)


def _short_settings(given: dict[str, Any]) -> list[str]:
    """Return what the short flags stand for, as `--set` takes it."""
    settings = [
        f"{part}=null" if given[part] == "none" else f"{part}.format={given[part]}"
        for part in ("weights", "activations")
        if given[part]
    ]
    if given["block"]:
        settings += ["weights.granularity=block", f"weights.block_size={given['block']}"]
    if given["algorithm"]:
        settings.append(f"weights.algorithm={given['algorithm']}")
    if given["bias_correction"]:
        settings.append("bias_correction=true")
    return settings


def _set(keys: dict[str, Any], text: str) -> None:
    """Put one ``part.key=value`` into the recipe's keys; the value is read as YAML."""
    import yaml

    path, separator, value = text.partition("=")
    *parts, last = path.split(".")
    if not separator or not last or len(parts) > 1:
        raise UsageError("--set cannot be understood", found=text, expected="key=value or part.key=value")
    place = keys
    for part in parts:
        if not isinstance(place.get(part), dict):  # absent, null, or a format's name
            place[part] = {"format": place[part]} if isinstance(place.get(part), str) else {}
        place = place[part]
    place[last] = yaml.safe_load(value)


def _statistics(job: Job, recipe: Recipe, given: dict[str, Any]) -> tuple[Recipe, Calibration | None]:
    """Return the recipe with its algorithms written out, and the statistics that it needs."""
    from ..stages.quantize import has_grams, needed_detail, needs_statistics, profits_from_statistics, runs_in_order
    from .collecting import collect_statistics, has_data, read_statistics

    known = read_statistics(given["calib"], job, by_name=given["calib_by_name"]) if given["calib"] else None
    recipe = recipe.settled(knows_inputs=has_data(given) or (known is not None and has_grams(known)))
    chains = job.balance(recipe, known)
    if chains and not given["quiet"]:
        output.note(f"equalized the weights of {len(chains)} chains of layers, {sum(map(len, chains))} layers in all")
    in_order = has_data(given) and runs_in_order(recipe)
    wanted = profits_from_statistics if has_data(given) else needs_statistics
    if known is None and wanted(recipe, in_order=in_order):
        detail = needed_detail(recipe, in_order=in_order)
        known = collect_statistics(job, {**given, "detail": detail}, job.needed(recipe))
    return recipe, known


def _save_side_files(plan: Plan, recipe: Recipe, given: dict[str, Any]) -> None:
    import json

    import yaml

    from ..files import replace_file

    if given["save_plan"]:
        with replace_file(given["save_plan"], force=given["force"]) as tmp:
            tmp.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
    if given["save_recipe"]:
        with replace_file(given["save_recipe"], force=given["force"]) as tmp:
            tmp.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _weight_bytes(model: Model) -> int:
    from ..graph import constants, stored_size

    return sum(stored_size(constant) for constant in constants(model.graph))


def _report(result: Quantized | Preview, recipe: Recipe, given: dict[str, Any], outcome: _Outcome) -> None:
    from ..stages.tune import describe_passes

    nodes = result.plan.nodes()
    quantized, kept = _split(nodes.values(), recipe)
    before, after = outcome.sizes
    methods = Counter(s.method for s in result.activations.values())
    data = {
        "written": [str(p) for p in outcome.written],
        "quantized_nodes": len(quantized),
        "kept_nodes": len(kept),
        "weight_bytes_before": before,
        "weight_bytes_after": after,
        "methods": dict(methods),
        "opset": outcome.opset,
        "passes": result.passes,
        "notes": list(outcome.notes),
        "equalize": [asdict(entry) for entry in getattr(result, "foreseen", getattr(result, "equalized", ()))],
        "data_runs": asdict(result.runs) if hasattr(result, "runs") else None,
        "estimate": outcome.expected.to_dict(),
        "measured": outcome.took.to_dict() if outcome.took else None,
        "plan": result.plan.to_dict(),
    }
    lines = [
        f"scheme {recipe.scheme}, target {result.plan.target}, ranges by "
        + (", ".join(f"{name} ({n})" for name, n in methods.most_common()) or "none needed"),
        f"quantized {len(quantized)} of {len(nodes)} nodes, weights {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB",
        *(f"rewritten for {result.plan.target}: {line}" for line in describe_passes(result.passes)),
    ]
    lines += _choices(result, recipe, given)
    for note in outcome.notes:
        output.warn(note)
    if not quantized:
        output.warn("nothing was quantized; the reasons are below")
    is_asked_for = given["why"] or given["dry_run"] or not quantized
    if is_asked_for:
        lines += output.table(
            ["node", "op", "stored as", "reason"],
            [[d.site.node, d.op, _stored(d), d.reason] for d in nodes.values()],
        )
    elif kept:
        lines += ["left in float (qpipe quantize --why lists every node):"]
        lines += output.table(["nodes", "reason"], [[n, reason] for reason, n in _reasons(kept).most_common()])
    lines += _cost_lines(outcome)
    lines += [f"wrote {path}" for path in outcome.written]
    output.emit(data, given["as_json"], [] if given["quiet"] and not is_asked_for else lines)


def _split(nodes: Iterable[Decision], recipe: Recipe) -> tuple[list[Decision], list[Decision]]:
    """Return what is quantized, and what is left in float: what keeps the type that it came with is among that."""
    quantized: list[Decision] = []
    kept: list[Decision] = []
    for d in nodes:
        is_quantized = d.spec is not None and (recipe.float_type or d.form != "cast")
        (quantized if is_quantized else kept).append(d)
    return quantized, kept


def _choices(result: Quantized | Preview, recipe: Recipe, given: dict[str, Any]) -> list[str]:
    """Return in words what was chosen where the recipe leaves a choice: algorithms of weights, equalized inputs."""
    from ..stages.choice import wants_data

    algorithms = Counter(d.algorithm for d in result.plan.coded() if d.site.role == "weight" and d.algorithm)
    named = ", ".join(f"{name} ({n})" for name, n in algorithms.most_common())
    lines = [f"weights by {named}"] if named else []
    if given["calib"] and set(algorithms) == {"rtn"} and wants_data(recipe) and recipe.weights.algorithm is None:
        lines[-1] += "; gptq takes statistics of qpipe calibrate --detail auto, or --data here"
    if corrected := getattr(result, "corrected", 0):
        lines.append(f"biases of {corrected} layers corrected")
    equalized = getattr(result, "equalized", ())
    if equalized:
        folded = sum(entry.folded for entry in equalized)
        lines.append(
            f"equalized {len(equalized)} inputs of layers: {folded} folded into what makes them, "
            f"{len(equalized) - folded} by a Mul"
        )
    return lines + _foreseen(result, recipe)


def _foreseen(result: Quantized | Preview, recipe: Recipe) -> list[str]:
    """Return what a preview says of work that is still to be done: equalizing, and runs of the data."""
    from ..stages.equalize import AUTO_EQUALIZER

    lines, found, runs = [], getattr(result, "foreseen", ()), getattr(result, "runs", None)
    if found:
        name = AUTO_EQUALIZER if recipe.equalize == "auto" else recipe.equalize
        layers, folds = sum(len(entry.layers) for entry in found), sum(entry.folds for entry in found)
        condition = " where that halves the error" if recipe.equalize == "auto" else ""
        lines.append(
            f"to equalize by {name}: {len(found)} inputs of {layers} layers; {folds} fold into what makes them, "
            f"{len(found) - folds} take a Mul{condition}"
        )
    if runs is not None and runs.count:
        what = [f"{runs.layers} layers one after the other"] * bool(runs.layers) + ["biases"] * recipe.bias_correction
        lines.append(
            f"{' and '.join(what)}: {runs.count} more runs of the data, about {runs.seconds:.1f} s of the time"
        )
    return lines


def _cost_lines(outcome: _Outcome) -> list[str]:
    """Return what was expected, beside what was measured where something was done."""
    if outcome.took is None:
        return [f"estimated: {_costs(outcome.expected)}; nothing was quantized or written"]
    rows = [["estimated", *_cells(outcome.expected)], ["measured", *_cells(outcome.took)]]
    return output.table(["", "output", "peak memory", "time"], rows)


def _costs(cost: Cost) -> str:
    size, peak, seconds = _cells(cost)
    return f"output {size}, peak memory {peak}, time {seconds}"


def _cells(cost: Cost) -> list[str]:
    return [f"{cost.output_bytes / 1e6:.1f} MB", f"{cost.peak_bytes / 1e6:.0f} MB", f"{cost.seconds:.1f} s"]


def _stored(decision: Any) -> str:
    from ..plan import spec_text

    return spec_text(decision.spec) if decision.spec else "float"


def _reasons(kept: list[Any]) -> Counter[str]:
    import re

    return Counter(re.sub(r"'[^']*'", "...", d.reason) + f" ({d.op})" for d in kept)
