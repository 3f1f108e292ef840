"""The methods that the demo compares, each at one setting or two."""

from benchmarks.common.recipes import Candidate

CANDIDATES = (
    Candidate("linear", "average", model_parameters={"weight": 1.0}, needs_base=False),
    *(
        Candidate("task_arithmetic", f"lambda {scale}", {"lambda": scale}, {"weight": 1.0})
        for scale in (0.3, 0.4)
    ),
    *(
        Candidate(
            "ties",
            f"density 0.2, lambda 1, {words}",
            {"lambda": 1.0, "normalize": normalize},
            {"weight": 1.0, "density": 0.2},
        )
        for normalize, words in ((True, "normalised"), (False, "not normalised"))
    ),
    *(
        Candidate(
            "dare_ties",
            f"density {density}, lambda {scale}",
            {"lambda": scale, "normalize": False},
            {"weight": 1.0, "density": density},
        )
        for density, scale in ((0.5, 0.3), (0.2, 0.4))
    ),
    *(
        Candidate(
            "cart",
            f"rank_ratio {ratio}, lambda {scale}",
            {"rank_ratio": ratio, "lambda": scale},
            needs_base=False,
        )
        for ratio, scale in ((0.08, 1.0), (0.16, 2.3))
    ),
    Candidate("cart_auto", "nothing to set", {}),
)

# Of two models, with nothing to choose.
OF_TWO = tuple(one for one in CANDIDATES if one.method in ("linear", "cart_auto"))
