"""Output of `manta check`: what each process of a job holds, how large the job is, what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deploy.assembly.memory_plan import DRIVER, GIB, Process
from deploy.report.console import Cell, Console, one_line, write, write_table
from deploy.run.job_size import DiskUse, Node, rows_of_rank
from deploy.run.recipe_check import Checked, CheckedRun, MemoryOfPolicy
from learner.training.memory_estimate import Amount, row_tokens
from learner.training.step_passes import passes_of


def show(run: CheckedRun, console: Console) -> int:
    """Print what was found; returns the exit status, 1 for a recipe that a run would refuse."""
    several = len(run.policies) > 1
    for checked in run.policies:
        _show_policy(checked, console, [] if several else _places(run.nodes))
    if several and run.disk is not None:
        write(console, f"{run.policies[0].config.name}: all {len(run.policies)} policies together")
        write_table(console, ("job", "figure"), [["disk", _disk(run.disk)], *_places(run.nodes)])
    for each in run.findings:  # a line each, whole also in a pipe, so that a script finds it
        write(console, *(("refused: ", "red") if each.certain else ("look: ", "yellow")), end="")
        write(console, one_line(each.text))
    if not run.findings:
        write(console, "nothing looks wrong")
    return int(run.refused)


def _show_policy(checked: Checked, console: Console, places: Sequence[Sequence[Cell]]) -> None:
    """places: rows about the nodes, of a run of one policy."""
    config = checked.config
    name = f"{config.name}, policy {config.policy}" if config.policies else config.name
    if checked.memory is None:
        write(console, f"{name}: memory is not told, since the model's configuration is not known here")
    else:
        write(console, f"{name}: {_model(checked, checked.memory)}")
        rows = _memory(checked.memory, bool(config.policies))
        write_table(console, ("process", "holds", "GPU, GiB", "host, GiB"), rows)
    write_table(console, ("job", "figure"), [*_figures(checked), *places])


def _model(checked: Checked, memory: MemoryOfPolicy) -> str:
    model, lora = memory.model, checked.config.learner.model.lora
    whole = f"{model.family}, {model.shape.parameters:,} parameters"
    return whole if lora is None else f"{whole}, {model.lora.adapter:,} of a low-rank adapter are trained"


def _memory(memory: MemoryOfPolicy, several: bool) -> Iterator[list[Cell]]:
    """One row an amount, and one with the most at once, of each process. several: there are other policies."""
    for process in memory.plan.processes:
        name = process.name if process.count == 1 else f"{process.name}, each of {process.count}"
        name += ", one for all policies" if several and process.name == DRIVER else ""
        for number, amount in enumerate(process.amounts):
            yield [name if number == 0 else "", _what(process, amount), *_columns(process, amount)]
        if len(process.amounts) > 1:
            on_gpu = _gib(process.peak(on_host=False)) if process.on_gpu else ""
            yield ["", ("at most", "bold"), (on_gpu, "bold"), (_gib(process.peak(on_host=True)), "bold")]


def _what(process: Process, amount: Amount) -> str:
    said = f"({amount.what})" if amount.at_times else amount.what
    return f"rank 0: {said}" if amount.lead and process.count > 1 else said


def _columns(process: Process, amount: Amount) -> list[Cell]:
    on_host = amount.on_host or not process.on_gpu
    return ["", _gib(amount.nbytes)] if on_host else [_gib(amount.nbytes), ""]


def _figures(checked: Checked) -> Iterator[list[Cell]]:
    size, config = checked.size, checked.config
    yield ["tokens sampled a step", f"at most {size.sampled:,}, of {size.episodes:,} episodes"]
    rows = f"rows of at most {row_tokens(config.learner, config.rollout.context_tokens):,}"
    yield ["tokens learned from a step", f"at most {size.processed:,}, prompts included, in {rows}"]
    yield ["optimizer steps", f"{size.optimizer_steps:,}, in {size.steps:,} learner steps"]
    for each in size.data:
        name = "data" if len(size.data) == 1 else f"data of {each.name}"
        played = f"{each.groups:,.0f} tasks are played"
        if each.rows is not None:
            passes = "" if each.passes is None else f": {each.passes:.3g} passes"
            played = f"{each.rows:,} rows, of which {each.groups:,.0f} are played{passes}"
        yield [name, played]
    samples = config.evaluation.samples
    tasks = sum(each.evaluation_tasks for each in size.data)
    tokens = samples * sum(each.evaluation_tasks * each.longest for each in size.data)
    suites = f"; and {len(config.evaluation.suites)} suites" if config.evaluation.suites else ""
    said = (
        f"{samples * tasks:,} episodes, at most {tokens:,} tokens, each time" if tasks else "none of its own"
    )
    yield ["evaluation", said + suites]
    if (memory := checked.memory) is None:
        return
    if config.learner.ranks > 1:
        yield ["exchanged by learner ranks", _exchanged(checked, memory)]
    if (cache := memory.plan.cache) is not None:
        fits = f"{cache.sequences(config.rollout.context_tokens):,.0f} sequences of full length"
        yield ["KV cache of an engine", f"{fits}, {cache.token_bytes / 1024:.4g} KiB a token"]
    yield ["disk", f"{_disk(memory.disk)} ({_gib(memory.disk.checkpoint)} GiB a checkpoint)"]


def _exchanged(checked: Checked, memory: MemoryOfPolicy) -> str:
    sent, rows = memory.plan.traffic, rows_of_rank(checked.config, checked.size)
    passes = passes_of(checked.config.learner, rows)
    parts = [
        (passes.trained, "rows", sent.row),
        (passes.scored, "rows that are only scored", sent.scored),
        (passes.taught, "rows that the teacher scores", sent.taught),
        (passes.valued, "times the hidden states of a row for values", sent.hidden),
        (passes.summed, "sums of gradients", sent.sums),
    ]
    said = [f"{count:,} {what} of {_gib(each)} GiB" for count, what, each in parts if count and each]
    across = f"; of a sum of gradients {_gib(sent.across)} GiB come from other copies" if sent.across else ""
    listed = f"{', '.join(said)}, and {_gib(sent.version)} GiB to publish{across}"
    return f"each receives at most {_gib(sent.step(passes))} GiB a step: {listed}"


def _disk(use: DiskUse) -> str:
    return f"at most {_gib(use.checkpoints)} GiB of checkpoints and {_gib(use.rows)} GiB of rows"


def _places(placed: Sequence[Node]) -> list[list[Cell]]:
    return [[f"node {number}", _node(node)] for number, node in enumerate(placed, 1)]


def _node(node: Node) -> str:
    actors = ", ".join(f"{name} x {count}" for name, count in node.actors)
    reserved = f"{node.gpus:g} GPUs, {node.cpus:g} CPUs" if node.gpus else f"{node.cpus:g} CPUs"
    return f"{actors}; {reserved}; at most {_gib(node.host_bytes)} GiB of the host's memory"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count < 100 * GIB else f"{count / GIB:,.0f}"
