"""The command line: `memlib COMMAND`; each command is one function here that prints its results."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlib.config import (
    Config,
    ConfigError,
    differences,
    load_config,
    override,
    parse_overrides,
    preset_names,
    reference_page,
    to_dict,
)

if TYPE_CHECKING:
    from memlib.inference import Tokenizer

EPILOG = """examples:
  memlib train recall_internal --seeds 0 1 2         runs/recall_internal/seed-0 …
  memlib train my.yaml training.max_steps=500 --out runs/mine
  memlib train adapter_smollm2                       teach facts to a pretrained model (`make model`)
  memlib plan design_7b --ranks 64                   memory of one of 64 GPUs, without any
  memlib launch hds_100m --slurm --nodes 2           an sbatch script
  memlib eval runs/recall_internal/seed-0 --segments 4 32 --json result.json
  memlib generate runs/notes --prompt "def " --temperature 0.8 --stream
  memlib generate runs/notes --prompt "Ann: " --state ann.safetensors    keep memory from call to call
  memlib generate adapter_smollm2 --prompt "What is the capital of France?"
  memlib export runs/notes                           compile the model, for programs without memlib
  memlib table recall                                train, measure and print a whole table
  memlib compress runs/topics_routed                 bytes and accuracy of a bank, by rank and bits
  memlib precision runs/notes --budgets 1e-3         bf16 or int8 for each block, within an error
  memlib retrieval --keys 1024 65536                 latency and recall of each index
  memlib retrieval runs/passkey_external/seed-0      a trained model's accuracy with each index
  memlib stream recall_internal recall_ltm model.segment_length=128     feed a million tokens to each
  memlib bench kernels                               speed of the kernels beside their peers
  memlib capacity                                    capacity of each memory
  memlib config show recall_internal                 every field of a preset
  memlib config diff recall_internal my.yaml         fields that differ
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; an error that the user can fix is printed as one line, with exit status 2.

    Training that a signal stopped has exit status 128 + the signal's number.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    changes = [word for word in rest if "=" in word and not word.startswith("-")]
    if changes != rest or (rest and not hasattr(arguments, "changes")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if changes:  # path=value behind an option, which argparse does not put together with those before it
        arguments.changes += changes
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"memlib: {stopped or 'stopped'}", file=sys.stderr)
        return getattr(stopped, "exit_status", 130)
    except (ConfigError, ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"memlib: {error}", file=sys.stderr)
        return 2


def add_config(command: argparse.ArgumentParser, change: str, presets: str = "") -> None:
    """Arguments of a command that reads a configuration; change: an example."""
    command.add_argument("config", help=f"a YAML file or a preset{presets}")
    command.add_argument("changes", nargs="*", metavar="path=value", help=f"e.g. {change}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memlib",
        description="Train, evaluate and inspect memory-augmented transformers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train a configuration")
    add_config(command, "training.max_steps=100", ": " + ", ".join(preset_names()))
    command.add_argument("--seeds", type=int, nargs="+", help="one run per seed (default: the config's seed)")
    command.add_argument("--out", type=Path, help="folder of the run(s) (default: runs/CONFIG)")
    command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    command.add_argument(
        "--download", action="store_true", help="allow fetching a pretrained model and its data from the hub"
    )
    command.set_defaults(run=train)

    command = commands.add_parser(
        "consolidate", help="write a run of several processes as one of one process"
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    command.add_argument("--out", type=Path, required=True, help="folder of the new run")
    command.set_defaults(run=consolidate)

    command = commands.add_parser("plan", help="estimate the memory of one rank of a training run")
    add_config(command, "parallel.mixed_precision=bf16")
    command.add_argument("--ranks", type=int, default=1, help="processes of the run, one for each GPU")
    command.add_argument("--memory-gib", type=float, default=80.0, help="memory of a GPU (default: 80)")
    command.add_argument("--json", type=Path, help="also write the result here")
    command.set_defaults(run=plan)

    command = commands.add_parser("launch", help="write the file that starts a run on Slurm or Kubernetes")
    add_config(command, "parallel.mixed_precision=bf16")
    system = command.add_mutually_exclusive_group(required=True)
    system.add_argument(
        "--slurm", dest="system", action="store_const", const="slurm", help="an sbatch script"
    )
    system.add_argument(
        "--kubernetes", dest="system", action="store_const", const="kubernetes", help="a PyTorchJob"
    )
    command.add_argument("--nodes", type=int, default=1, help="machines")
    command.add_argument("--gpus-per-node", type=int, default=8, help="GPUs, and processes, of each")
    command.add_argument("--image", default="memlib:latest", help="container image (Kubernetes)")
    command.add_argument("--out", type=Path, help="file to write (default: print)")
    command.set_defaults(run=launch)

    command = commands.add_parser("eval", help="measure the accuracy of trained runs")
    command.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of their seeds")
    command.add_argument("--segments", type=int, nargs="+", default=[4, 32], help="lengths of the examples")
    command.add_argument("--json", type=Path, help="also write the results here")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("generate", help="generate text with a trained run")
    command.add_argument(
        "name", help="folder of a run or of a saved adapter, or an adapter preset: its run in runs/, if any"
    )
    command.add_argument(
        "--prompt", required=True, help="text to continue, or a message (--chat); - reads standard input"
    )
    command.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="pretrained models: the prompt is a message, in the chat template (default for models that are "
        "tuned for instructions)",
    )
    command.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens")
    command.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token")
    command.add_argument("--top-k", type=int, help="sample from the k most probable tokens")
    command.add_argument("--top-p", type=float, help="sample from the smallest set with probability p")
    command.add_argument("--stop", help="an additional token that ends the text")
    command.add_argument(
        "--seed", type=int, help="sampling seed (default: continue --state's generator, or 0)"
    )
    command.add_argument("--stream", action="store_true", help="print text while it is generated")
    command.add_argument("--state", type=Path, help="file that keeps the memory from call to call")
    command.add_argument("--download", action="store_true", help="allow fetching a pretrained model")
    command.set_defaults(run=generate)

    command = commands.add_parser("export", help="compile a trained run's model for programs without memlib")
    command.add_argument("folder", help="folder of a run")
    command.add_argument("--out", type=Path, help="package to write (default: FOLDER/model.pt2)")
    command.add_argument("--batch-size", type=int, default=1, help="number of streams read in parallel")
    command.set_defaults(run=export)

    command = commands.add_parser("table", help="train and measure all runs of a published table")
    command.add_argument(
        "name",
        choices=["recall", "rewrite", "passkey", "mixed", "compression", "slots", "prototype"]
        + ["age", "banks", "topics", "collapse", "low_rank", "horizon"]
        + ["facts", "long_context"],
    )
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument(
        "--segments", type=int, nargs="+", help="lengths of the examples (default: the published ones)"
    )
    command.add_argument(
        "--out", type=Path, default=Path("runs"), help="folder of the runs; finished runs in it are reused"
    )
    command.add_argument("--json", type=Path, help="default: OUT/NAME.json")
    command.set_defaults(run=table)

    command = commands.add_parser("compress", help="accuracy of trained chapters by rank and bits")
    command.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of their seeds")
    command.add_argument("--examples", type=int, default=256, help="examples to measure on")
    command.add_argument("--json", type=Path, help="also write the results here")
    command.set_defaults(run=compress)

    command = commands.add_parser("precision", help="bf16 or int8 for each block, by a budget of error")
    command.add_argument("folder", type=Path, help="folder of a run")
    command.add_argument("--budgets", type=float, nargs="+", default=[1e-3], help="nats per token")
    command.add_argument("--examples", type=int, default=64, help="examples to measure on")
    command.add_argument("--json", type=Path, help="also write the levels of each block here")
    command.set_defaults(run=precision)

    command = commands.add_parser("retrieval", help="measure latency and recall of each index")
    command.add_argument(
        "folder", nargs="?", type=Path, help="measure the accuracy of this run (with external memory) instead"
    )
    command.add_argument(
        "--keys", type=int, nargs="+", default=[1024, 8192, 65_536], help="numbers of keys (without a run)"
    )
    command.add_argument("--dim", type=int, default=64, help="width of a key (without a run)")
    command.add_argument("--segments", type=int, default=66, help="length of the examples (with a run)")
    command.add_argument("--examples", type=int, default=64, help="number of examples (with a run)")
    command.add_argument("--index", nargs="+", help="indexes to measure (default: all)")
    command.add_argument("--json", type=Path, help="also write the results here")
    command.set_defaults(run=retrieval)

    command = commands.add_parser("hybrid", help="ablate each part of a trained hybrid")
    command.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of their seeds")
    command.add_argument("--segments", type=int, default=16, help="length of the examples")
    command.add_argument("--family", default="fact", help="tokens for which the oracle gate searches")
    command.add_argument("--examples", type=int, default=128)
    command.add_argument("--json", type=Path, help="also write the results here")
    command.set_defaults(run=hybrid)

    command = commands.add_parser("stream", help="long stream benchmark: are memory and speed constant?")
    command.add_argument(
        "words", nargs="+", metavar="CONFIG | path=value", help="YAML files or presets, and changes to all"
    )
    command.add_argument("--tokens", type=int, default=1_000_000, help="tokens of each stream")
    command.add_argument("--batch", type=int, default=1, help="streams in parallel")
    command.add_argument("--segments", type=int, default=32, help="segments per call")
    command.add_argument(
        "--store",
        action="append",
        default=[],
        metavar="INDEX",
        help="also measure external memory in a store with this index (may be repeated)",
    )
    command.add_argument("--json", type=Path, help="also write the results here")
    command.set_defaults(run=stream)

    command = commands.add_parser("bench", help="speed of kernels and exports; how time and memory grow")
    command.add_argument(
        "name",
        choices=["kernels", "complexity", "compiled", "balance", "windows"],
        help="kernels: beside their peers; complexity: exponents; compiled: exports beside their models; "
        "balance: padding by layout of documents; windows: sliding windows beside full attention",
    )
    command.add_argument("--json", type=Path, help="also write the results here")
    command.set_defaults(run=bench)

    command = commands.add_parser("capacity", help="capacity of each memory, as Markdown")
    command.add_argument("--out", type=Path, help="file to write (default: print)")
    command.set_defaults(run=capacity)

    command = commands.add_parser("config", help="show, check or document configurations")
    what = command.add_subparsers(required=True, metavar="WHAT")
    show = what.add_parser("show", help="print every field of a configuration")
    add_config(show, "model.num_layers=4")
    show.set_defaults(run=config_show)
    validate = what.add_parser("validate", help="check YAML files or presets")
    validate.add_argument("configs", nargs="+", help="YAML files or presets")
    validate.set_defaults(run=config_validate)
    diff = what.add_parser("diff", help="print the fields that differ; exit status 1 if any differ")
    diff.add_argument("one", help="a YAML file or a preset")
    diff.add_argument("other", help="a YAML file or a preset")
    diff.set_defaults(run=config_diff)
    docs = what.add_parser("docs", help="print the reference of all fields, as Markdown")
    docs.add_argument("--out", type=Path, help="file to write (default: print)")
    docs.set_defaults(run=config_docs)

    command = commands.add_parser("doctor", help="report what this machine and environment support")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=doctor)
    return parser


def read_config(name: str, changes: list[str]) -> Config:
    return override(load_config(name), parse_overrides(changes))


def seed_folders(runs: list[Path]) -> list[Path]:
    """The seed folders of each run, or the run itself if it has none."""
    return [seed for run in runs for seed in (sorted(run.glob("seed-*")) or [run])]


def write_rows(rows: object, path: Path | None) -> None:
    """Write results as JSON if a path is given; dataclasses become mappings."""
    import json
    from dataclasses import asdict

    from memlib.files import write_text

    if path:
        write_text(path, json.dumps(rows, indent=1, default=asdict) + "\n")


def train(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.config, arguments.changes)
    if config.adapter.base_model_name is not None:
        return train_adapter(arguments, config)
    import torch

    from memlib.models import MemoryTransformer
    from memlib.models.info import print_model_info
    from memlib.training.trainer import Trainer

    main_process = os.environ.get("RANK", "0") == "0"  # of those that a launcher starts
    if main_process:
        with torch.device("meta"):
            print_model_info(MemoryTransformer(config), config)
    for seed, folder in seeds_and_folders(arguments, config):
        trainer = Trainer(override(config, {"training.seed": seed}), folder, arguments.resume)
        trainer.train()
        score = trainer.evaluate()
        if main_process:
            print(
                f"{folder}: {trainer.step} steps, {trainer.cpu_seconds:.1f} CPU-s, test accuracy "
                f"{score.accuracy:.4f} (chance {score.chance:.4f}), loss {score.loss:.4f}"
            )
    return 0


def consolidate(arguments: argparse.Namespace) -> int:
    from memlib.training.trainer import consolidate as write

    print(write(arguments.folder, arguments.out) / "model.safetensors")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    from memlib.training.parallel.plan import make_plan, to_table

    config = read_config(arguments.config, arguments.changes)
    found = make_plan(config, arguments.ranks, arguments.memory_gib)
    print(to_table(found, config))
    write_rows(found, arguments.json)
    return 0


def launch(arguments: argparse.Namespace) -> int:
    from memlib.training.parallel.launch import launch_file

    config = read_config(arguments.config, arguments.changes)
    words = [arguments.config, *arguments.changes]
    text = launch_file(
        arguments.system, config, words, arguments.nodes, arguments.gpus_per_node, arguments.image
    )
    return write_page(text, arguments.out)


def seeds_and_folders(arguments: argparse.Namespace, config: Config) -> list[tuple[int, Path]]:
    """The seeds of `memlib train`, each with the folder of its run."""
    out = arguments.out or Path("runs", Path(arguments.config).stem)
    alone = arguments.out and not arguments.seeds
    return [
        (seed, out if alone else out / f"seed-{seed}") for seed in arguments.seeds or [config.training.seed]
    ]


def train_adapter(arguments: argparse.Namespace, config: Config) -> int:
    """Train what a pretrained model gets, as `training.training_mode` says."""
    from memlib.pretrained.extras import extra

    extra("transformers")
    from memlib.experiments import taught_facts
    from memlib.pretrained.finetune import Finetuning
    from memlib.training.log import read_log

    mode, download = config.training.training_mode, arguments.download
    if mode == "comparison":
        taught_facts.check_base(config)
        out = arguments.out or Path("runs", Path(arguments.config).stem)
        return pretrained_table("facts", arguments.seeds or [0, 1, 2], out / "facts.json")
    allowed = {"task.instructions.download": True, "task.documents.download": True} if download else {}
    for seed, folder in seeds_and_folders(arguments, config):
        changed = override(config, allowed | {"training.seed": seed})
        if mode == "facts":
            taught = taught_facts.teach_run(changed, folder, download)
            print(
                f"{folder}: {taught['facts']} facts, {taught['steps']} steps, {taught['cpu_seconds']:.1f} "
                f"CPU-s, recall of taught phrasings {taught['taught']:.4f}, of unseen ones "
                f"{taught['unseen']:.4f}; facts in {folder / 'taught.json'}"
            )
            continue
        run = Finetuning(changed, folder, arguments.resume, download=download)
        run.train()
        last = [record for record in read_log(folder) if "loss" in record][-1]
        print(
            f"{folder}: {run.step} steps, {run.cpu_seconds:.1f} CPU-s, training loss {last['loss']:.4f}, "
            f"accuracy {last['accuracy']:.4f}"
        )
    return 0


def pretrained_table(name: str, seeds: list[int], path: Path) -> int:
    """Run what is missing of a comparison on a pretrained model, and print its table."""
    from memlib.experiments import long_context, taught_facts

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    if name == "facts" and seeds != list(range(len(seeds))):
        raise ValueError(f"--seeds {seeds}: rates are chosen on seed 0, so use 0 1 2 … without gaps")
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "facts":
        shown = taught_facts.to_table(taught_facts.run_all(path, seeds=len(seeds), log=log))
    else:
        shown = long_context.to_table(long_context.run_all(path, seeds=seeds, log=log))
    print(f"{shown}\n\nwritten to {path}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from memlib.experiments.comparison import measure, to_markdown, write_json
    from memlib.training.trainer import load_run

    results = []
    for folder in seed_folders(arguments.runs):
        name = folder.parent.name if folder.name.startswith("seed-") else folder.name
        results.append(measure(load_run(folder), name, arguments.segments))
    print(to_markdown(results))
    if arguments.json:
        write_json(results, arguments.json)
    return 0


def generate(arguments: argparse.Namespace) -> int:
    import torch

    from memlib.inference import GenerationConfig, TokenStream, load_state, save_state
    from memlib.inference.sampling import seeded

    model, tokenizer, encode = speaker(arguments)
    torch.set_num_threads(model.config.training.num_threads)
    stop = tokenizer.encode(arguments.stop or "")
    if len(stop) > 1:
        raise ValueError(f"--stop {arguments.stop!r}: is {len(stop)} tokens; use a single token")
    config = GenerationConfig(
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop_tokens=(*tokenizer.stop, *stop),
    )
    state, random = None, None
    if arguments.state and arguments.state.exists():
        state, random = load_state(arguments.state, model)
    generator = seeded(arguments.seed or 0)
    if random is not None and arguments.seed is None:
        generator.set_state(random)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    tokens = TokenStream(model, [encode(prompt, state is not None)], state, config, generator)
    pieces = tokenizer.pieces(token.id for token in tokens if token.id not in config.stop_tokens)
    if arguments.stream:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print("".join(pieces))
    if arguments.state:
        save_state(tokens.states[0], arguments.state, model, generator.get_state())
    return 0


def speaker(arguments: argparse.Namespace) -> tuple[Any, Tokenizer, Callable[[str, bool], list[int]]]:
    """A model that generates, its tokenizer, and what turns (prompt, whether it goes on) into ids."""
    from memlib.pretrained.runs import adapter_config, open_adapter

    if (found := adapter_config(arguments.name)) is None:
        from memlib.inference import tokenizer_for
        from memlib.training.trainer import load_model

        if arguments.chat is not None:
            raise ValueError(
                "--chat and --no-chat: are for pretrained models; a model of a task has no turns"
            )
        model = load_model(arguments.name)
        words = tokenizer_for(model.config)
        return model, words, lambda text, goes_on: words.encode(text)
    from memlib.pretrained.extras import extra

    extra("transformers")
    from memlib.pretrained.tokenizer import PretrainedTokenizer, is_chat_model

    config, folder = found
    if folder is None:
        name = config.adapter.base_model_name
        print(f"memlib: {arguments.name} is not trained here; {name} speaks, untaught", file=sys.stderr)
    elif not Path(arguments.name).exists():
        print(f"memlib: {folder}", file=sys.stderr)
    adapter, own, _ = open_adapter(config, folder, arguments.download)
    tokenizer = PretrainedTokenizer(own, adapter.base)
    chat = is_chat_model(config, own) if arguments.chat is None else arguments.chat
    return adapter, tokenizer, lambda text, goes_on: tokenizer.prompt(text, chat, goes_on)


def export(arguments: argparse.Namespace) -> int:
    from memlib.pretrained.runs import adapter_config

    if adapter_config(arguments.folder) is not None:
        raise ValueError(
            f"{arguments.folder}: is an adapter, and the layers of its base are transformers' own code, run "
            "through hooks; only models that memlib trains from scratch can be exported"
        )
    import torch

    from memlib.inference.export import export_model
    from memlib.training.trainer import load_model

    model = load_model(arguments.folder).cpu()
    torch.set_num_threads(model.config.training.num_threads)
    path = export_model(model, arguments.out or Path(arguments.folder, "model.pt2"), arguments.batch_size)
    size, n = path.stat().st_size / 1e6, model.segment_length
    print(f"{path}: {size:.1f} MB; reads segments of {n} tokens, batch size {arguments.batch_size}")
    print(
        f'load it without memlib: torch._inductor.aoti_load_package("{path}"); '
        "examples/export has programs in Python and C++ that read it"
    )
    return 0


def table(arguments: argparse.Namespace) -> int:
    from memlib.experiments.comparison import compare, summary, to_markdown, write_json
    from memlib.experiments.studies import LENGTHS, MEASURES, PREPARED, named_comparison

    if arguments.name in ("facts", "long_context"):
        path = arguments.json or arguments.out / f"{arguments.name}.json"
        return pretrained_table(arguments.name, arguments.seeds, path)
    configs = named_comparison(arguments.name)
    segments = arguments.segments or LENGTHS.get(arguments.name, [4, 6, 32])
    measures, prepare = MEASURES.get(arguments.name), PREPARED.get(arguments.name)
    results = compare(configs, arguments.seeds, segments, arguments.out, measures=measures, prepare=prepare)
    target = arguments.json or arguments.out / f"{arguments.name}.json"
    write_json(results, target)
    print(f"{to_markdown(results)}\n\n{summary(results)}")
    print(f"\nwritten to {target}")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from memlib.evaluation import balance, compiled, complexity, windows
    from memlib.files import write_text
    from memlib_kernels import bench as kernels

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    parts: dict[str, Any] = {"kernels": kernels, "complexity": complexity, "compiled": compiled}
    parts |= {"balance": balance, "windows": windows}
    part = parts[arguments.name]
    results = part.measure_all(log=log)
    print(part.to_table(results))
    if arguments.json:
        rows = {"machine": kernels.machine(), "results": [asdict(result) for result in results]}
        write_text(arguments.json, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return 0


def compress(arguments: argparse.Namespace) -> int:
    from memlib.evaluation.compressed import bytes_against_accuracy, compressed_table
    from memlib.evaluation.table import markdown
    from memlib.training.trainer import load_run

    results = []
    for folder in seed_folders(arguments.runs):
        trainer = load_run(folder)
        results.append(bytes_against_accuracy(trainer.model, trainer.task, examples=arguments.examples))
    print(markdown(*compressed_table(results)))
    write_rows(results, arguments.json)
    return 0


def precision(arguments: argparse.Namespace) -> int:
    from memlib.evaluation.precision import choose, to_table
    from memlib.training.trainer import load_run

    trainer = load_run(arguments.folder)
    tokens = trainer.task.batch(arguments.examples, 0, split="test").tokens.to(trainer.device)
    results = [choose(trainer.model, [tokens], budget) for budget in arguments.budgets]
    print(to_table(results))
    write_rows(results, arguments.json)
    return 0


def retrieval(arguments: argparse.Namespace) -> int:
    from memlib.evaluation import retrieval as measured
    from memlib.evaluation.table import markdown
    from memlib.training.trainer import load_run

    names = arguments.index or list(measured.INDEXES)
    for name in names:
        measured.named_index(name)
    if arguments.folder is None:
        measure = [measured.measure_index(n, keys, arguments.dim) for keys in arguments.keys for n in names]
        print(markdown(*measured.index_table(measure)))
        write_rows(measure, arguments.json)
    else:
        trainer = load_run(arguments.folder)
        task = trainer.task_with(segments=arguments.segments)
        by_task = measured.measure_task(trainer.model, task, names, arguments.examples)
        print(markdown(*measured.task_table(by_task)))
        write_rows(by_task, arguments.json)
    return 0


def hybrid(arguments: argparse.Namespace) -> int:
    from memlib.evaluation.hybrid import hybrid_table, measure_hybrid
    from memlib.evaluation.table import markdown
    from memlib.training.trainer import load_run

    results = {}
    for folder in seed_folders(arguments.runs):
        trainer = load_run(folder)
        task = trainer.task_with(segments=arguments.segments)
        rows = measure_hybrid(trainer.model, task, arguments.family, arguments.examples)
        print(f"{folder}, {arguments.segments} segments\n\n{markdown(*hybrid_table(rows))}\n")
        results[f"{folder.parent.name}/{folder.name}"] = rows
    write_rows(results, arguments.json)
    return 0


def stream(arguments: argparse.Namespace) -> int:
    from memlib.evaluation import long_stream as measured
    from memlib.evaluation.retrieval import named_index
    from memlib.evaluation.table import markdown

    names = [word for word in arguments.words if "=" not in word]
    changes = [word for word in arguments.words if "=" in word]
    searches = {name: named_index(name) for name in arguments.store}
    results = []
    for name in names:
        config = read_config(name, changes)
        stored = list(searches.items()) if "external" in config.memory.kinds else []
        for search, index in [("", None), *stored]:
            results.append(
                measured.measure_stream(
                    config, name, arguments.tokens, arguments.batch, arguments.segments, search, index
                )
            )
            print(f"{name} {search}: {results[-1].cpu_seconds:.0f} CPU-s", file=sys.stderr)
    print(markdown(*measured.stream_table(results)))
    write_rows(results, arguments.json)
    complaints = [f"{r.name} {r.search}: {what}" for r in results for what in r.unsteady()]
    print(
        "\n".join(["", *complaints] if complaints else ["", "constant: memory, speed, and the copy's logits"])
    )
    return 1 if complaints else 0


def capacity(arguments: argparse.Namespace) -> int:
    from memlib.evaluation.capacity import page

    return write_page(page(), arguments.out)


def config_show(arguments: argparse.Namespace) -> int:
    import yaml

    config = read_config(arguments.config, arguments.changes)
    print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
    return 0


def config_validate(arguments: argparse.Namespace) -> int:
    for name in arguments.configs:
        load_config(name)
        print(f"{name}: valid")
    return 0


def config_diff(arguments: argparse.Namespace) -> int:
    found = differences(load_config(arguments.one), load_config(arguments.other))
    for path, mine, theirs in found:
        print(f"{path}: {mine} -> {theirs}")
    return 1 if found else 0


def config_docs(arguments: argparse.Namespace) -> int:
    return write_page(reference_page(), arguments.out)


def write_page(text: str, out: Path | None) -> int:
    """Write a page of the docs, or print it."""
    from memlib.files import write_text

    if out:
        write_text(out, text)
    else:
        print(text, end="")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from memlib.doctor import main as report

    return report(["--json"] if arguments.json else [])


if __name__ == "__main__":
    sys.exit(main())
