"""The suite's methods and the settings that each may choose from on the validation split.

Every method gets at most `MOST_POINTS` settings. Those of FusionBench run as it has them, under
the names of its configs; what it lacks for image encoders is in `extra`.
"""

from __future__ import annotations

from benchmarks.common.fusion import Method

MOST_POINTS = 12

_SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)
_LARGE_SCALES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
_FEW_SCALES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
_LAMBDAS = (2.0, 3.0, 4.0, 6.0)
_OWN = "benchmarks.vision.extra"
# What `benchmarks.common.peers` decides: whole methods, and SVC after others.
PEER, CALIBRATED = f"method._target_={_OWN}.Peer", f"method._target_={_OWN}.Calibrated"
# AdaMerging on encoders: heads from the task pool, images that need no processing.
_ADAPTING = (
    "method.heads=${taskpool.heads}",
    "method.processor={_target_: torch.nn.Identity}",
    "method.num_workers=0",
    "method.merging_weights_save_path=null",
    "method.max_steps=20",
    "method.batch_size=8",
)
_UNLABELLED = "unlabelled validation images"

METHODS: dict[str, Method] = {
    "average": Method("simple average", "simple_average"),
    "task_arithmetic": Method(
        "task arithmetic", "task_arithmetic", (), {"scaling_factor": _SCALES}, "scaling_factor"
    ),
    "ties": Method(
        "TIES",
        "ties_merging",
        (),
        {"threshold": (10, 20), "scaling_factor": _FEW_SCALES},
        "scaling_factor",
    ),
    "dare": Method(
        "DARE, task arithmetic",
        "dare/task_arithmetic",
        (),
        {"sparsity_ratio": (0.5, 0.8), "scaling_factor": _FEW_SCALES},
        "scaling_factor",
    ),
    "dare_ties": Method(
        "DARE, TIES",
        "dare/ties_merging",
        (),
        {"sparsity_ratio": (0.5, 0.8), "scaling_factor": _FEW_SCALES},
        "scaling_factor",
    ),
    "model_stock": Method(
        "model stock", "model_stock/model_stock", ("method.model_save_path=null",)
    ),
    "tsvm": Method(
        "TSV-M",
        "task_singular_vector/TaskSingularVectorMerging",
        (),
        {"alpha": _LARGE_SCALES},
        "alpha",
    ),
    "iso_c": Method(
        "Iso-C",
        "isotropic_merging/iso_c",
        (),
        {"scaling_factor": _LARGE_SCALES},
        "scaling_factor",
    ),
    "iso_cts": Method(
        "Iso-CTS",
        "isotropic_merging/iso_cts",
        (),
        {"scaling_factor": _LARGE_SCALES},
        "scaling_factor",
    ),
    "wudi": Method(
        "WUDI",
        "wudi/wudi",
        (f"method._target_={_OWN}.GramWUDI",),
        {"iter_num": (100, 300, 1000)},
    ),
    "aswudi": Method("ASWUDI", "dummy", (PEER, "+method.rule=aswudi")),
    "swudi": Method(
        "SWUDI",
        "dummy",
        (PEER, "+method.rule=swudi", "+method.rank_ratio=0.65", "+method.time=300"),
        # What the authors report for CLIP and Llama, and a lower rank.
        {"rank_ratio": (0.35, 0.5, 0.65, 0.85), "time": (300, 1300)},
    ),
    "ace": Method(
        "ACE-Merging",
        "dummy",
        (PEER, "+method.rule=ace", "+method.eps=1e-5"),
        {"eps": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 2e-4, 1e-3)},
    ),
    "dc_merge": Method(
        "DC-Merge",
        "dummy",
        (PEER, "+method.rule=dc_merge", "+method.density=1e-3", "+method.scaling_factor=1"),
        # The authors' 1e-3 keeps, of a core of width 384, half as many as of theirs of width 768.
        {"density": (1e-3, 3e-3, 1e-2), "scaling_factor": (0.85, 1.0, 1.3, 1.6)},
        "scaling_factor",
    ),
    "svc": Method(
        "SVC, task arithmetic",
        "dummy",
        (
            CALIBRATED,
            "+method.base_method={_target_: fusion_bench.method.TaskArithmeticAlgorithm,"
            " scaling_factor: 1.0}",
        ),
        {"base_method.scaling_factor": (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)},
    ),
    "svc_tsvm": Method(
        "SVC, TSV-M",
        "dummy",
        (
            CALIBRATED,
            "+method.alpha=1.0",  # the authors', who leave all other methods 1 / T
            "+method.base_method={_target_: fusion_bench.method.TaskSingularVectorMerging,"
            " alpha: 1.0}",
        ),
        {"base_method.alpha": (0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0)},
    ),
    "doge": Method(
        "DOGE, task arithmetic",
        "doge_ta/doge_ta",
        (f"method._target_={_OWN}.MatrixDOGE",),
        {"lamda": (0.05, 0.07, 0.1)},
    ),
    "regmean": Method(
        "RegMean",
        "regmean/regmean",
        (f"method._target_={_OWN}.ImageRegMean", "+method.weight_transpose=true"),
        {"reduce_non_diagonal_ratio": (0.1, 0.5, 0.9, 0.95, 1.0)},
        data="unlabelled training images",
    ),
    "adamerging_task": Method(
        "AdaMerging, task-wise",
        "cart/plain_adamerging_image",
        (*_ADAPTING, "method.granularity=task"),
        {"init_values": (0.15, 0.3), "lr": (0.003, 0.01, 0.03)},
        data=_UNLABELLED,
    ),
    "adamerging_layer": Method(
        "AdaMerging, layer-wise",
        "cart/plain_adamerging_image",
        _ADAPTING,
        {"init_values": (0.15, 0.3), "lr": (0.003, 0.01, 0.03)},
        data=_UNLABELLED,
    ),
    "low_rank": Method(
        "uncentred low rank",
        "cart/uncentered",
        (),
        {"rank_ratio": (0.08, 0.16, 0.32), "scaling_factor": (0.05, 0.1, 0.2, 0.4)},
        "scaling_factor",
    ),
    "cart": Method(
        "CART",
        "cart",
        (),
        {"rank_ratio": (0.08, 0.16, 0.32), "scaling_factor": _LAMBDAS},
        "scaling_factor",
    ),
    "cart_auto": Method("CART, no hyperparameters", "cart/auto"),
    "cart_adamerging": Method(
        "CART + AdaMerging",
        "cart/adamerging_image",
        (*_ADAPTING, "method.rank_ratio=0.16"),
        {"scaling_factor": (2.0, 3.0, 4.0), "lr": (0.003, 0.01, 0.03, 0.1)},
        data=_UNLABELLED,
    ),
    "cart_adarank": Method(
        "CART + AdaRank",
        "cart/adarank_image",
        (*_ADAPTING, "method.ranks_save_path=null", "method.rank_ratio=0.16"),
        # Of 20 steps the last one and the last four can turn directions on or off. With rates of
        # 0.05 and 0.1, ten and five steps of one mind do, and entropy takes all apart
        # (`benchmarks/notes/vision_suite.md`).
        {"scaling_factor": (2.0, 3.0, 4.0), "lr": (0.003, 0.01), "mask_lr": (0.026, 0.03)},
        data=_UNLABELLED,
    ),
    "emr": Method("EMR", "emr_merging/emr_merging", keeps="a mask a task"),
    "cart_indexing": Method(
        "CART-Indexing",
        "cart/indexing",
        # Position embeddings too: kept whole, they take as much as a point and a half of rank.
        ("method.switch=true", 'method.decompose="*"'),
        {"rank_ratio": (0.06,), "scaling_factor": (1.0, 1.2, 1.4)},
        "scaling_factor",
        keeps="low-rank factors a task",
    ),
}

# The two ends of the table, by the same program.
PRETRAINED = Method("pretrained", "dummy")
INDIVIDUAL = Method(
    "individual",
    "dummy",
    (f"method._target_={_OWN}.Individual",),
    keeps="a model a task",
)

# What the plots need besides.
HEAT = Method(
    "CART",
    "cart",
    (),
    {
        "rank_ratio": (0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
        "scaling_factor": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    },
    "scaling_factor",
)
BY_TASKS = ("average", "task_arithmetic", "ties", "tsvm", "iso_c", "cart", "cart_auto")
INDEXING_RATIOS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.16, 0.32)
