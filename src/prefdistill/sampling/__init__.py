"""Responses from a model, in memory or as a data file."""

from prefdistill.core.registry import Registry

ENGINES = Registry(
    "engine",
    "engines",
    {
        "transformers": "prefdistill.sampling.engines:TransformersEngine",
        "ray": "prefdistill.sampling.ray_engine:RayEngine",
        "vllm": "prefdistill.sampling.engines:VLLMEngine",
    },
)
