"""The commands about proofs: of a network's images, of one property, of radii, and the check of certificates.

As in every command, what can be told without torch is told before it is imported.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certtrain.bound_methods import BRANCH_AND_BOUND, STAGES
from certtrain.cli import values
from certtrain.cli.named_run import config_of, folder_of, open_network, open_weights, require_data, require_held_out
from certtrain.cli.options import Subparsers, add_command, refuse, take_run
from certtrain.cli.tables import show_results
from certtrain.errors import UsageError, optional_module
from certtrain.runs.files import RADII, RADII_PLOT, VERIFIED, WEIGHTS
from certtrain.runtime.console import Output, tell
from certtrain.runtime.device import check_device_name
from certtrain.runtime.launch import launched, require_one_process
from certtrain.verification.certificates import require_checkable

if TYPE_CHECKING:
    from torch import nn

    from certtrain.config import Config
    from certtrain.config.schema import VerificationSection
    from certtrain.data import Split
    from certtrain.verification.certificates import ImageSet
    from certtrain.verification.verification import Verification


def add_verify(subparsers: Subparsers) -> None:
    about = "natural, PGD and verified error of a trained network"
    command = add_command(subparsers, "verify", about, verify_command, shared=True)
    take_run(command, "; with --vnnlib an ONNX file, with --model-weights a config")
    command.add_argument("--eps", help="one radius or several: 2/255,8/255 (default: those of the config)")
    command.add_argument(
        "--method",
        help="bounds, each for what those before left unknown: ibp,crown-ibp,crown,alpha-crown,branch-and-bound",
    )
    command.add_argument(
        "--timeout",
        type=values.seconds,
        metavar="SECONDS",
        help="of branch and bound, for each image, or for the property (default: the config's, or 100)",
    )
    command.add_argument(
        "--workers", type=values.positive, metavar="N", help="processes that share images and CPUs (default: 1)"
    )
    command.add_argument(
        "--results", type=values.path, metavar="FILE", help="where images that are finished stand; go on from there"
    )
    command.add_argument(
        "--attack",
        help="attacks, each on what those before left: pgd,apgd-ce,apgd-dlr,apgd-t (default: the config's; of a "
        "property pgd,apgd-ce,apgd-t)",
    )
    command.add_argument("--limit", type=values.positive, help="only the first N test images")
    command.add_argument(
        "--sound", metavar="ARITHMETIC", help="bounds that cover the rounding of float32, tf32, bf16 or float64"
    )
    command.add_argument(
        "--certificates", type=values.path, metavar="FILE", help="write a Parquet file that `check` reads"
    )
    command.add_argument(
        "--radius",
        nargs="?",
        const=True,
        type=values.radius,
        metavar="MAX",
        help="instead: the largest radius proved for each image, up to MAX (default: twice the largest tested)",
    )
    command.add_argument(
        "--model-weights",
        type=values.path,
        metavar="FILE",
        help="a network trained elsewhere: its state dict, .pth or .safetensors, for the model of the config",
    )
    command.add_argument(
        "--vnnlib",
        type=values.path,
        metavar="FILE",
        help="instead: decide this property, and print the verdict as in VNN-COMP",
    )
    command.add_argument(
        "--json", type=values.path, help="where to write the results (default: verify.json in the run)"
    )


def verify_command(options: argparse.Namespace) -> int:
    if options.vnnlib is not None:
        return _decide_property(options)
    if _is_onnx(options.run):
        raise UsageError(f"{options.run} is a network in ONNX: say which property to decide, with --vnnlib FILE")
    if options.model_weights is not None:
        refuse(options, "--model-weights", "radius", "certificates")
    return _verify_images(options) if options.radius is None else _verify_radii(options)


def _verify_images(options: argparse.Namespace) -> int:
    folder, elsewhere = folder_of(options.run), options.model_weights is not None
    weights = folder / WEIGHTS if options.run.is_dir() else options.run
    handed_out = not elsewhere and weights.name == WEIGHTS  # not a checkpoint on the way
    if not launched():  # ranks fail together, inside
        require_data(_asked(options, weights))

    from certtrain.models.own import modules_from
    from certtrain.runs.build import load_data
    from certtrain.runs.evaluation import verify_run
    from certtrain.runs.progress import VerificationDisplay
    from certtrain.runs.verdicts import read_verdicts
    from certtrain.runtime.distributed import process_group

    with process_group() as ranks:
        with ranks.together():
            if ranks.is_first:
                _check_outputs(options)
            config = _asked(options, weights)
            opened = None if elsewhere else open_network(options, config, ranks)
            if ranks.is_first and handed_out:
                read_verdicts(folder)  # can be added to
        dataset = ranks.one_per_machine_first(lambda: load_data(config))
        with ranks.together():
            model = opened or open_weights(options, config, dataset, ranks)
        display = VerificationDisplay(Output(quiet=not ranks.is_first))
        try:
            with display, modules_from(config.model.path):  # workers look for the network's modules where this does
                results = verify_run(
                    config,
                    model,
                    dataset,
                    options.limit,
                    ranks,
                    options.workers or 1,
                    options.results,
                    display.add,
                    certificates=options.certificates is not None,
                )
        except KeyboardInterrupt:
            if options.results and ranks.is_first:
                count = f"{display.done} more images are in {options.results}"
                tell(Output(), f"interrupted: {count}; the same command goes on from there")
            raise
        if not ranks.is_first:
            return 0
    show_results(Output(), [result.summary() for result in results], split=config.verification.split)
    _write_results(options, config, model, dataset.test, results)
    if handed_out:
        _add_verdicts(folder, config, dataset.test, results)
    if options.certificates:  # the last, since an image may have nothing that could be certified
        _write_certificates(options, config, model, dataset.test, weights, results)
    return 0


def _results_file(options: argparse.Namespace) -> Path | None:
    """Where the errors go, if they go anywhere: those of weights from elsewhere have no folder of their own."""
    return options.json or (None if options.model_weights else folder_of(options.run) / VERIFIED)


def _check_outputs(options: argparse.Namespace) -> None:
    """Raises where a file could not be written in the end, or would stand in the place of another."""
    from certtrain.runs.directory import check_output

    used, file = options.model_weights or options.run, _results_file(options)
    if options.certificates:
        check_output(options.certificates, used)
    if file is not None:
        check_output(file, used, *filter(None, [options.certificates]), own=VERIFIED)
    if options.results:
        check_output(options.results, used, *filter(None, [options.certificates, options.json]))


def _write_certificates(
    options: argparse.Namespace,
    config: Config,
    model: nn.Module,
    split: Split,
    weights: Path,
    results: Sequence[Verification],
) -> None:
    from certtrain.modules import device_of
    from certtrain.runs.provenance import versions
    from certtrain.verification.certificates import write_certificates

    folders = {"root", "path"}  # where this machine keeps things
    hidden: Any = {"data": folders, "model": folders, "start_from": folders, "replay": {"data": folders}}
    settings = config.model_dump(mode="json", exclude=hidden)
    used = versions(device_of(model))
    write_certificates(options.certificates, results, split, weights, settings, used)
    print(
        f"wrote {options.certificates}; certtrain check {options.certificates} --model {folder_of(options.run)} "
        "proves it again"
    )


def _write_results(
    options: argparse.Namespace, config: Config, model: nn.Module, split: Split, results: Sequence[Verification]
) -> None:
    from certtrain.runs.directory import write_results
    from certtrain.runs.provenance import made_with
    from certtrain.runtime.files import write_json

    summaries, file = [result.summary() for result in results], _results_file(options)
    about = {"split": config.verification.split, "model": str(options.model_weights or options.run)}
    content = {**summaries[0], **about, "radii": summaries, **made_with(config, model, split)}
    if options.json:
        write_json(options.json, content)
    elif file is not None and (kept := write_results(file, content)):
        print(f"the earlier results, which were others, are kept in {kept}")


def _add_verdicts(folder: Path, config: Config, split: Split, results: Sequence[Verification]) -> None:
    from certtrain.runs.directory import is_writable
    from certtrain.runs.verdicts import add_verdicts, verdicts_of

    if is_writable(folder):
        add_verdicts(folder, verdicts_of(config, split, results))
    else:
        print(f"nothing can be written to {folder}: its verdicts.json does not have these images' verdicts")


def _asked(options: argparse.Namespace, weights: Path) -> Config:
    """The run's configuration with what the command line changes; raises where that could not be used."""
    config = config_of(options, options.run, _changes(options))
    if options.certificates and config.verification.arithmetic is None:  # which are about what is computed
        config = config_of(options, options.run, _changes(options, arithmetic="float32"))
    _require_search(options, config.verification)
    if options.certificates:
        _require_certifiable(weights, config)
    if options.model_weights is None:
        require_held_out(config, options.run)
    return config


def _require_certifiable(weights: Path, config: Config) -> None:
    """Raises where nobody could check the certificates that are asked for."""
    from certtrain.verification.checker.network import require_known

    if weights.suffix != ".safetensors":
        raise UsageError(f"certificates are about a finished network, a model.safetensors, not {weights}")
    require_checkable(config.verification.method, config.test_radii)
    require_known(config.model.name)
    if config.verification.split != "test":
        raise UsageError("certificates are about a test set: not with verification.split=validation")
    if config.data.classes is not None:
        raise UsageError("certificates are about a whole test set: not with data.classes")


def _decide_property(options: argparse.Namespace) -> int:
    unused = ["eps", "limit", "sound", "certificates", "radius", "json", "model_weights", "results", "workers"]
    refuse(options, "--vnnlib", *unused)
    require_one_process("certtrain verify --vnnlib")
    check_device_name(options.device)
    run = None if _is_onnx(options.run) else config_of(options, options.run)

    from certtrain.config.loading import load_verification

    thorough = {"verification": {"method": list(STAGES), "attack": ["pgd", "apgd-ce", "apgd-t"]}}
    overrides = [text for text in options.overrides if run is None or not text.startswith("model.path=")]
    section = load_verification([thorough, *overrides, _changes(options)])
    _require_search(options, section)

    from certtrain.importing.onnx import import_onnx
    from certtrain.importing.vnnlib import counterexample, read_property
    from certtrain.runs.build import resolve_device
    from certtrain.runs.checkpoint import load_architecture
    from certtrain.runs.evaluation import build_attack, build_search
    from certtrain.runtime.distributed import ALONE
    from certtrain.verification.properties import decide

    cases = read_property(options.vnnlib)
    if run is None:
        network, device = import_onnx(options.run), resolve_device(options.device, ALONE)
        model, shape, replay = network.module.to(device), network.input_shape, network.run
    else:
        model, replay = open_network(options, run), None
        shape = load_architecture(folder_of(options.run))["image_shape"]
    asked = (section.method, build_attack(section))
    decision = decide(model, cases, shape, *asked, search=build_search(section.search), replay=replay)
    print(decision.verdict)
    if decision.point is not None and decision.outputs is not None:
        print(counterexample(decision.point, decision.outputs))
    return 0


def _is_onnx(path: Path) -> bool:
    return path.name.endswith((".onnx", ".onnx.gz"))


def _changes(options: argparse.Namespace, arithmetic: str | None = None) -> dict[str, Any]:
    search = None if options.timeout is None else {"timeout": options.timeout}
    named = {
        "eps": options.eps,
        "method": options.method,
        "arithmetic": arithmetic if options.sound is None else options.sound,
        "attack": options.attack,
        "search": search,
    }
    return {"verification": {key: value for key, value in named.items() if value is not None}}


def _verify_radii(options: argparse.Namespace) -> int:
    unused = [
        "certificates",
        "json",
        "method",
        "timeout",
        "results",
        "workers",
        *([] if options.radius is True else ["eps"]),
    ]
    refuse(options, "--radius", *unused)
    if not launched():  # ranks fail together, inside
        require_data(_asked(options, options.run))

    from certtrain.report.plots import errors_over_eps_png
    from certtrain.runs.build import load_data
    from certtrain.runs.directory import check_output, write_results
    from certtrain.runs.evaluation import radii_of
    from certtrain.runs.provenance import made_with
    from certtrain.runtime.distributed import process_group
    from certtrain.runtime.files import write_atomically

    folder = folder_of(options.run)
    with process_group() as ranks:
        with ranks.together():
            config = _asked(options, options.run)
            largest = 2 * max(config.test_radii) if options.radius is True else options.radius
            if largest <= 0:
                raise UsageError(f"--radius: the largest radius to try must be positive, not {largest}")
            if ranks.is_first:
                optional_module("matplotlib", "report")  # known now rather than after all proofs
                for name in (RADII, RADII_PLOT):
                    check_output(folder / name, options.run, own=name)
            model = open_network(options, config, ranks)
        dataset = ranks.one_per_machine_first(lambda: load_data(config))
        content = radii_of(config, model, dataset, largest, options.limit, ranks).summary()
        if not ranks.is_first:
            return 0
    about = made_with(config, model, dataset.test)
    kept = write_results(folder / RADII, {**content, "model": str(options.run), **about})
    curves = {
        "pgd": (content["pgd_eps"], content["pgd_error"]),
        "verified": (content["eps"], content["verified_error"]),
    }
    picture = errors_over_eps_png(content["natural_error"], curves)
    write_atomically(folder / RADII_PLOT, lambda file: file.write(picture))
    shares = [f"{share:.0%} of the images: {_quantile(content['radii'], share):.5f}" for share in (0.25, 0.5, 0.75)]
    print("proved radius of at least " + ", ".join(shares))
    print(f"wrote {folder / RADII} and {RADII_PLOT}" + (f"; the earlier radii are kept in {kept}" if kept else ""))
    return 0


def _quantile(radii: Sequence[float], share: float) -> float:
    """The radius that this share of the images reaches; 0 where fewer are classified right."""
    ordered = sorted(radii, reverse=True)
    return max(0.0, ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _require_search(options: argparse.Namespace, section: VerificationSection) -> None:
    """A time limit is one of a search."""
    if options.timeout is not None and BRANCH_AND_BOUND not in section.method:
        raise UsageError(
            f"--timeout cannot be combined with method {','.join(section.method)}: it is for {BRANCH_AND_BOUND}"
        )


def add_check(subparsers: Subparsers) -> None:
    command = add_command(
        subparsers,
        "check",
        "prove certificates again, by an independent program",
        check_command,
        device=False,
    )
    command.add_argument("certificates", type=values.path, help="a Parquet file that `verify --certificates` wrote")
    command.add_argument(
        "--model", type=values.path, required=True, metavar="RUN", help="the run directory they are about"
    )
    command.add_argument("--dataset", metavar="NAME", help="the data set that they must be about (default: any)")
    command.add_argument(
        "--data",
        type=values.path,
        default=Path("data"),
        metavar="DIR",
        help="where its files are: the folder of test.npz, or of train/, which numbers the classes, and test/, or that "
        "of the named data sets (default: data)",
    )
    command.add_argument("--allow-partial", action="store_true", help="permit certificates for some of the images only")


def check_command(options: argparse.Namespace) -> int:
    """Nothing here comes from the run but its network: which images are asked about, the user says."""
    from certtrain.verification.certificates import read_certificates
    from certtrain.verification.checker import SavedNetwork, check
    from certtrain.verification.checker.raw_images import read_test_set

    certificates = read_certificates(options.certificates)
    network = SavedNetwork.read(folder_of(options.model) / WEIGHTS)
    name = options.dataset or certificates.header.data.name
    images, labels = read_test_set(name, options.data)
    console = Output(highlight=False, markup=False, soft_wrap=True)
    claims = check(certificates, network, name, images, labels, console, options.allow_partial)
    data = certificates.header.data
    console.print(f"the test set of {name}: {data.images} images, SHA-256 {data.sha256}, {_provenance(data)}")
    partial = False
    for claim in claims:
        missing = data.images - claim.images
        partial = partial or missing > 0
        covered = f"PARTIAL, {claim.images} of {data.images} images" if missing else f"all {data.images} images"
        counts = f"{claim.proved} proved, {claim.attacked} attacked, {claim.unknown} unknown"
        console.print(f"{claim}: {covered}: {counts}" + f"; of {missing} images nothing is known" * (missing > 0))
    total = sum(claim.images for claim in claims)
    console.print(f"all {total} certificates hold" + ", but they leave images out: PARTIAL" * partial)
    return 0


def _provenance(data: ImageSet) -> str:
    from certtrain.verification.checker.raw_images import KNOWN_TEST_SETS

    if data.name in KNOWN_TEST_SETS:
        return "which is the published one"
    return "which this program does not know: compare it with that of the images you mean"
