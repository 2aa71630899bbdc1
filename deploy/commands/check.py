"""Output of `manta check`: what each process of a job holds, how large the job is, what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.assembly.memory_plan import GIB, Process
from deploy.report.console import Cell, Console, write, write_table
from deploy.run.job_size import Node, rows_of_rank
from deploy.run.recipe_check import Checked, MemoryOfRun
from learner.training.memory_estimate import Amount, row_tokens
from learner.training.step_passes import passes_of


def show(checked: Checked, console: Console) -> int:
    """Print what was found; returns the exit status, 1 for a recipe that a run would refuse."""
    config = checked.config
    name = f"{config.name}, policy {config.policy}" if config.policies else config.name
    if checked.memory is None:
        write(console, f"{name}: memory is not told, since the model's configuration is not known here")
    else:
        write(console, f"{name}: {_model(checked, checked.memory)}")
        write_table(console, ("process", "holds", "GPU, GiB", "host, GiB"), _memory(checked.memory))
    write_table(console, ("job", "figure"), _figures(checked))
    rows: list[list[Cell]] = [
        [("refused", "red") if each.certain else ("look", "yellow"), each.text] for each in checked.findings
    ]
    if rows:
        write_table(console, ("", "finding"), rows)
    else:
        write(console, "nothing looks wrong")
    return int(checked.refused)


def _model(checked: Checked, memory: MemoryOfRun) -> str:
    model, lora = memory.model, checked.config.learner.model.lora
    whole = f"{model.family}, {model.shape.parameters:,} parameters"
    return whole if lora is None else f"{whole}, {model.lora.adapter:,} of a low-rank adapter are trained"


def _memory(memory: MemoryOfRun) -> Iterator[list[Cell]]:
    """One row an amount, and one with the most at once, of each process."""
    for process in memory.plan.processes:
        name = process.name if process.count == 1 else f"{process.name}, each of {process.count}"
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
        played = f"{each.groups:,.0f} are played"
        rows = "tasks, of which" if each.rows is None else f"{each.rows:,} rows, of which"
        yield [name, f"{rows} {played}" + ("" if each.passes is None else f": {each.passes:.3g} passes")]
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
    disk = memory.disk
    if (cache := memory.plan.cache) is not None:
        fits = f"{cache.sequences(config.rollout.context_tokens):,.0f} sequences of full length"
        yield ["KV cache of an engine", f"{fits}, {cache.token_bytes / 1024:.4g} KiB a token"]
    checkpoints = f"{_gib(disk.checkpoints)} GiB of checkpoints ({_gib(disk.checkpoint)} each)"
    yield ["disk", f"at most {checkpoints} and {_gib(disk.rows)} GiB of rows"]
    for number, node in enumerate(memory.nodes, 1):
        yield [f"node {number}", _node(node)]


def _exchanged(checked: Checked, memory: MemoryOfRun) -> str:
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


def _node(node: Node) -> str:
    actors = ", ".join(f"{name} x {count}" for name, count in node.actors)
    reserved = f"{node.gpus:g} GPUs, {node.cpus:g} CPUs" if node.gpus else f"{node.cpus:g} CPUs"
    return f"{actors}; {reserved}; at most {_gib(node.host_bytes)} GiB of the host's memory"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count < 100 * GIB else f"{count / GIB:,.0f}"
