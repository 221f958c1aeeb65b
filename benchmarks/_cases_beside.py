"""Cases beside other methods, in turns within this run: covers, PyTorch, a GAN, optimum-onnx."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial

from examples.demo import carried_photo

from benchmarks._cases_ours import OPERATIONS_EXCLUDE, operation_ways
from benchmarks._session import Session
from benchmarks._timing import Way, clock, in_turns
from benchmarks.peers import NotRunError, PeerProcess
from benchmarks.protocol.baselines import BASELINES
from diffveil.presets import PRESETS

__all__ = ["gan", "optimum", "paper", "photos"]

_COMPILED_TURNS = 2


def photos(session: Session) -> None:
    """Whole photos: ours, with and without a key, beside blur and mosaic, ours and deface's."""
    with ExitStack() as stack:
        deface: PeerProcess | None = None
        try:
            deface = stack.enter_context(PeerProcess("deface"))
        except NotRunError as error:
            session.recorder.not_run("photo/astronaut", "deface", str(error))
        for name in ("astronaut", "group"):
            ways, faces = _photo_ways(session, name)
            if deface is not None:
                path = str(carried_photo(name))
                for kind in BASELINES:
                    ways[f"deface {kind}"] = partial(_asked, deface, photo=path, way=kind)
            session.keep(
                f"photo/{name}",
                in_turns(ways, session.seconds, fewest=session.fewest),
                base=session.provider,
                faces=faces,
                preset="fast",
                includes="detection",
                counted="as many as ours finds, for all",
                excluded="loading, reading and writing files",
            )


def _photo_ways(session: Session, name: str) -> tuple[dict[str, Way], int]:
    pixels, protector = session.photo(name), session.protector
    faces = protector.detector.detect(pixels)

    def covered(kind: str) -> object:
        return BASELINES[kind](pixels, *protector.detector.detect(pixels))

    ours = session.provider
    ways = {
        ours: clock(partial(protector.anonymize, pixels, seed=1, make_key=False)),
        f"{ours}, with key": clock(partial(protector.anonymize, pixels, seed=1)),
    }
    ways |= {f"NumPy {kind}": clock(partial(covered, kind)) for kind in BASELINES}
    return ways, len(faces)


def _asked(peer: PeerProcess, **question: object) -> float:
    return float(peer.ask(**question)["seconds"])


def paper(session: Session) -> None:
    """The published recipe in PyTorch, by the oracle and by diffusers, beside ours: one face."""
    from benchmarks._paper import PaperCase

    case, ours = PaperCase(session.protector.bundle, session.face), session.provider
    ways: dict[str, Way] = {}
    for name in ("fast",) if session.quick else tuple(PRESETS):
        ways[f"{ours}, {name}"] = operation_ways(session, PRESETS[name])["anonymize"]
    ways["PyTorch oracle"] = clock(case.one)
    noise = case.noise[:, 0]
    eager = case.diffusers(compiled=False)
    ways["diffusers eager"] = clock(partial(eager.anonymize, case.image, noise))
    if not session.quick:
        try:
            compiled = case.diffusers(compiled=True)
            call = partial(compiled.anonymize, case.image, noise)
            started = time.perf_counter()
            call()
            first = time.perf_counter() - started
        except Exception as error:  # the compiler's own errors share no base
            # The compiler's own words stand far below what was run.
            said = str(error).splitlines()
            lines = [said[0], *(line for line in said if "error: " in line)][:2]
            why = f"torch.compile: {type(error).__name__}: {'; '.join(lines)}"[:400]
            session.recorder.not_run("anonymize/one variant", "diffusers torch.compile", why)
        else:
            ways["diffusers torch.compile"] = clock(call)
            session.recorder.add(
                "anonymize/first call", "diffusers torch.compile", "time", "s", [first]
            )
    base = f"{ours}, fast"
    session.keep(
        "anonymize/one variant",
        in_turns(ways, 0.0, fewest=_slow_turns(session)),
        base=base,
        excluded=OPERATIONS_EXCLUDE,
    )
    if session.quick:
        return
    _released(session, clock(case.released))


def _released(session: Session, oracle: Way) -> None:
    """Four variants and their key."""
    from diffveil.noise import NoiseKey

    operations, crops, fast = session.protector.operations, session.crops(1), PRESETS["fast"]

    def ours() -> object:
        batch = operations.prepare(crops)
        operations.invert(batch, fast.recovery)
        keys = [NoiseKey.from_seed(0)]
        return operations.anonymize(batch, fast.anonymize, keys=keys, variants=4)

    name = f"{session.provider}, fast"
    session.keep(
        "anonymize/four variants and key",
        in_turns({name: clock(ours), "PyTorch oracle": oracle}, 0.0, fewest=_slow_turns(session)),
        base=name,
        excluded=OPERATIONS_EXCLUDE,
    )


def _slow_turns(session: Session) -> int:
    return min(session.fewest, 3)


def gan(session: Session) -> None:
    """A StyleGAN2 generator of 1024² with an encoder of e4e's size, random weights, one face."""
    import torch

    from benchmarks._gpu_gan import GanAnonymizer

    network = GanAnonymizer((1024, 512), (256, 512)).eval().requires_grad_(False)
    photo = torch.rand((1, 3, 256, 256)) * 2 - 1

    def call() -> object:
        with torch.inference_mode():
            return network(photo)

    ours = f"{session.provider}, fast"
    ways = {
        ours: operation_ways(session, PRESETS["fast"])["anonymize"],
        "StyleGAN2-1024 and e4e, PyTorch eager": clock(call),
    }
    session.keep(
        "anonymize/GAN",
        in_turns(ways, session.seconds, fewest=_slow_turns(session)),
        base=ours,
        excluded=OPERATIONS_EXCLUDE,
        unlike="the GAN draws 1024 pixels square, the bundle 128; its weights are random",
    )


def optimum(session: Session) -> None:
    """optimum-onnx's img2img beside ours: the same networks, as many steps, no guidance."""
    from benchmarks._small_diffusion import SmallDiffusion

    small = SmallDiffusion(session.folder / "small", session.threads)
    with ExitStack() as stack:
        try:
            peer = stack.enter_context(PeerProcess("optimum"))
            peer.ask(model=str(small.model), threads=session.threads)
            question = {"steps": small.STEPS, "strength": small.STRENGTH, "side": small.SIDE}
            evaluations = peer.ask(**question)["evaluations"]
        except NotRunError as error:
            session.recorder.not_run("img2img/equal steps", "optimum-onnx", str(error))
            return
        ways: dict[str, Way] = {
            session.provider: clock(small.ours(evaluations)),
            "optimum-onnx": partial(_asked, peer, **question),
        }
        session.keep(
            "img2img/equal steps",
            in_turns(ways, session.seconds, fewest=session.fewest),
            base=session.provider,
            evaluations=evaluations,
            excluded="export, loading, identity guidance, which optimum-onnx has not",
        )
