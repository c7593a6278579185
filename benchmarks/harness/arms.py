"""Arms: the ways to serve one model that are compared, each as flags of a server."""

import dataclasses
from collections.abc import Mapping, Sequence

FORMS = (
    "plain, static[:STEPS-TOPK-TOKENS], static-grid, adaptive or cast[:POLICY[:C1-C2-C3]], each "
    "with +KEY=VALUE for --cast-KEY VALUE or +--FLAG=VALUE for any flag; cast+draft=none serves "
    "without a draft"
)
DEFAULT_STATIC = "5-4-8"
# SGLang's own choice for Llama first; then chains and trees from small to large.
STATIC_GRID = ("5-4-8", "3-1-4", "3-2-4", "4-2-6", "2-2-4", "1-1-2")
GRID_ARM = "static-grid"
NO_DRAFT = "draft=none"
# Where SGLang's adaptive mode begins by itself; from there it moves among chains of 0 to 7 steps.
ADAPTIVE_STEPS = 3
LABELS = {"plain": "plain", "static": "EAGLE-3", "adaptive": "SGLang adaptive", "cast": "CAST"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to serve the same model, as flags and environment of a server."""

    name: str
    kind: str  # plain | static | adaptive | cast
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # What the log says when SGLang starts, but without what the arm asks for.
    refusal: str | None = None

    @property
    def label(self) -> str:
        """The arm's name for people."""
        return f"{LABELS[self.kind]} {self.name[len(self.kind) :].lstrip(':')}".strip()


def kind_of(name: str) -> str:
    """Return the kind of the arm of this name: plain, static, adaptive or cast."""
    return name.split("+")[0].split(":")[0]


def static_shape(name: str) -> tuple[int, int, int] | None:
    """Return the layers, the nodes of a layer and the verified rows of a static arm's tree."""
    if kind_of(name) != "static":
        return None
    steps, topk, tokens = (name.split("+")[0].partition(":")[2] or DEFAULT_STATIC).split("-")
    return int(steps), int(topk), int(tokens)


def parse_arm(text: str, draft: str, profile: str | None = None) -> Arm:
    """Read an arm.

    Args:
        text: `plain`; `static` or `static:STEPS-TOPK-TOKENS`, SGLang's EAGLE-3 with a fixed tree;
            `adaptive`, SGLang's EAGLE-3 with chains whose length it adapts; `cast`, `cast:POLICY`
            or `cast:POLICY:C1-C2-C3`. Each may end with settings: `+KEY=VALUE` becomes
            `--cast-KEY VALUE`, `+--FLAG=VALUE` any other flag; a switch has no `=VALUE`.
            `cast+draft=none` serves without a draft, and with a profile that it finds itself.
        draft: path or hub id of the draft model.
        profile: cost profile for CAST; None to let it search.

    Raises:
        ValueError: the text is none of these.
    """
    head, *settings = text.split("+")
    kind, _, detail = head.partition(":")
    has_draft = kind != "cast" or NO_DRAFT not in settings
    more = tuple(
        word
        for setting in settings
        if has_draft or setting != NO_DRAFT
        for word in _setting_flags(setting, kind)
    )
    suffix = "".join(f"+{setting}" for setting in settings)
    draft_flag = ("--speculative-draft-model-path", draft)
    if kind == "plain" and not detail:
        return Arm(text, kind, more)
    if kind == "static" and len(shape := (detail or DEFAULT_STATIC).split("-")) == 3:
        flags = ("--speculative-algorithm", "EAGLE3", *draft_flag, *_shape_flags(*shape))
        return Arm(f"static:{'-'.join(shape)}{suffix}", kind, flags + more)
    if kind == "adaptive" and not detail:
        flags = ("--speculative-algorithm", "EAGLE3", *draft_flag)
        flags += _shape_flags(str(ADAPTIVE_STEPS), "1", str(ADAPTIVE_STEPS + 1))
        flags += ("--speculative-adaptive", *more)
        return Arm(text, kind, flags, refusal="speculative_adaptive disabled:")
    if kind == "cast":
        flags = ("--speculative-algorithm", "CAST", *(draft_flag if has_draft else ()))
        if profile is not None and has_draft:
            flags += ("--cast-profile", profile)
        policy, _, prices = detail.partition(":")
        if policy:
            flags += ("--cast-policy", policy)
        if prices:
            c1, c2, c3 = prices.split("-")
            flags += ("--cast-c1", c1, "--cast-c2", c2, "--cast-c3", c3)
        return Arm(text, kind, flags + more)
    raise ValueError(f"{text!r} is no arm; use {FORMS}")


def parse_arms(
    texts: Sequence[str],
    draft: str,
    profile: str | None = None,
    static_grid: Sequence[str] = STATIC_GRID,
) -> list[Arm]:
    """Read several arms; `static-grid` stands for one static arm of each shape of the grid.

    Raises:
        ValueError: one is no arm, or named twice. An arm of the grid may also be named apart.
    """
    named = [parse_arm(text, draft, profile) for text in texts if text != GRID_ARM]
    if len({arm.name for arm in named}) < len(named) or texts.count(GRID_ARM) > 1:
        raise ValueError("--arms: each arm at most once")
    arms: dict[str, Arm] = {}
    for text in texts:
        expanded = [f"static:{shape}" for shape in static_grid] if text == GRID_ARM else [text]
        arms |= {(arm := parse_arm(word, draft, profile)).name: arm for word in expanded}
    return list(arms.values())


def split(arms: Sequence[Arm], at_once: int) -> list[list[Arm]]:
    """Split arms into groups of at most `at_once` servers, as even as can be.

    Several groups all begin with the plain arm, by which arms of different groups are compared.

    Raises:
        ValueError: they do not fit together, and cannot be split.
    """
    if len(arms) <= at_once:
        return [list(arms)]
    plain = [arm for arm in arms if arm.kind == "plain"][:1]
    others = [arm for arm in arms if arm not in plain]
    if at_once < 2 or not plain:
        raise ValueError(
            f"{len(arms)} arms are more than --at-once {at_once}; groups of them need the arm "
            "plain, by which they are compared, and room for 2"
        )
    num_groups = -(-len(others) // (at_once - 1))
    return [[*plain, *others[start::num_groups]] for start in range(num_groups)]


def _shape_flags(steps: str, topk: str, tokens: str) -> tuple[str, ...]:
    steps, topk, tokens = (str(int(size)) for size in (steps, topk, tokens))
    flags = ("--speculative-num-steps", steps, "--speculative-eagle-topk", topk)
    return (*flags, "--speculative-num-draft-tokens", tokens)


def _setting_flags(setting: str, kind: str) -> list[str]:
    key, equals, value = setting.partition("=")
    if not key.startswith("--"):
        if not key or kind != "cast":
            raise ValueError(f"+{setting}: {kind or 'an'} arm has no such setting; use {FORMS}")
        key = f"--cast-{key.replace('_', '-')}"
    return [key, value] if equals else [key]
