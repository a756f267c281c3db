"""A worker for `--worker-cls` that gives `HedgeSpecProposer` the names of the requests."""

from __future__ import annotations

from typing import Any

from hedgespec.errors import EngineError
from hedgespec.integrations.vllm.token_proposer import TESTED, HedgeSpecProposer, check_version

check_version((TESTED,), "hedgespec.integrations.vllm.worker.Worker")

from vllm.platforms import current_platform  # noqa: E402  after the check of the version

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_cuda_alike():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    raise EngineError(f"worker_cls: expected a platform with CPU or GPU workers, got {current_platform.device_name}")


class Worker(PlatformWorker):
    """The platform's worker; its proposer can read the model runner.

    The proposer then identifies requests by the engine's names: a preempted request continues with its state, and the state of
    one that ends or is aborted is discarded at once.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if isinstance(drafter := getattr(self.model_runner, "drafter", None), HedgeSpecProposer):
            drafter.runner = self.model_runner

    def execute_model(self, scheduler_output: Any) -> Any:
        found = super().execute_model(scheduler_output)
        if isinstance(drafter := getattr(self.model_runner, "drafter", None), HedgeSpecProposer):
            drafter.forget()  # also in the last step, in which nothing is drafted
        return found

    def hedgespec_report(self) -> dict:
        """Returns `HedgeSpecProposer.report` of this rank, for `LLM.collective_rpc("hedgespec_report")`."""
        drafter = getattr(self.model_runner, "drafter", None)
        return drafter.report() if isinstance(drafter, HedgeSpecProposer) else {}
