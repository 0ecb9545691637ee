"""Sites that come back: a process of a job that died is started again, and so is its part in it.

NVFlare ends a whole job when a site's process dies, and never gives a site that was restarted its
part back. Here a site that is away has failed in that round, and takes part in the next again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.collab.runtime.defs import SETUP_TASK_NAME, SyncKey
from nvflare.collab.runtime.executor import CollabExecutor

from sluiceway.deploy.nvflare.names import KIT
from sluiceway.deploy.nvflare.plain import refuse_tensors

refuse_tensors()

#: In the folder of a job at a site, as long as the site has a part in it: what it was told.
PART: Final = "part.json"
#: How often the process of one job is started again.
AGAIN: Final = 20
#: What a site is told of the others when a job begins.
TOLD: Final = (SyncKey.COLLAB_INTERFACE, SyncKey.SERVER_FQCN, SyncKey.CLIENT_INTERFACES)


class SiteExecutor(CollabExecutor):  # type: ignore[misc]
    """Collab's executor, which remembers what it was told, and needs not be told again."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._parent = os.getppid()

    def execute(self, task: str, told: Any, context: Any, abort: Any) -> Any:
        """Called by NVFlare with each task; the one that sets it up is remembered."""
        reply = super().execute(task, told, context, abort)
        if task == SETUP_TASK_NAME and reply.get_return_code() == ReturnCode.OK:
            remembered = {key: told.get(key) for key in TOLD}
            fresh = part_of(context).with_suffix(".new")
            fresh.write_text(json.dumps(remembered), encoding="utf-8")
            os.replace(fresh, part_of(context))
        return reply

    def _handle_start_run(self, event: str, context: Any) -> None:
        super()._handle_start_run(event, context)
        if part_of(context).exists():
            told = Shareable(json.loads(part_of(context).read_text(encoding="utf-8")))
            super().execute(SETUP_TASK_NAME, told, context, Signal())

    def _handle_end_run(self, event: str, context: Any) -> None:
        if os.getppid() == self._parent:  # else the site went away, and not the job
            part_of(context).unlink(missing_ok=True)
        super()._handle_end_run(event, context)


def part_of(context: Any) -> Path:
    """The file that says what part this site has in the job at hand."""
    workspace = context.get_engine().get_workspace()
    return Path(workspace.get_run_dir(context.get_job_id())) / PART


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Starts the processes of jobs at a site; again, if they die or the site was restarted."""

    def launch_job(self, job_meta: dict[str, Any], context: Any) -> JobHandleSpec:
        """Called by NVFlare when a job begins."""
        workspace = context.get_prop(FLContextKey.WORKSPACE_OBJECT)
        part = Path(workspace.get_run_dir(job_meta["job_id"])) / PART
        return RestartHandle(lambda: super(SiteLauncher, self).launch_job(job_meta, context), part)

    def handle_event(self, event: str, context: Any) -> None:
        """Called by NVFlare; once the site is connected, it takes its part in jobs again."""
        super().handle_event(event, context)
        if event == EventType.SYSTEM_START:
            workspace = Workspace(os.environ[KIT])
            for part in Path(workspace.get_root_dir()).glob(f"*/{PART}"):
                job = part.parent.name
                with contextlib.suppress(OSError, ValueError):
                    meta = json.loads(Path(workspace.get_job_meta_path(job)).read_text())
                    context.get_engine().start_app(job, meta)


class RestartHandle(JobHandleSpec):  # type: ignore[misc]
    """The process of a job: another takes its place if it dies while the site has its part.

    Args:
        start: starts a process.
        part: file that is there as long as the site has a part in the job.
    """

    def __init__(self, start: Callable[[], Any], part: Path) -> None:
        super().__init__()
        self._start, self._part = start, part
        self._over = threading.Event()
        self._handle = start()

    def terminate(self) -> None:
        """End it for good."""
        self._over.set()
        self._part.unlink(missing_ok=True)
        self._handle.terminate()

    def poll(self) -> Any:
        """How it ended. That it died is not told: NVFlare would end the whole job."""
        code = self._handle.poll()
        return JobReturnCode.UNKNOWN if code == JobReturnCode.EXECUTION_ERROR else code

    def wait(self) -> None:
        """Wait until the job is over at this site."""
        self._handle.wait()
        for _ in range(AGAIN):
            if self._over.is_set() or not self._part.exists():
                return
            self._handle = self._start()
            self._handle.wait()
