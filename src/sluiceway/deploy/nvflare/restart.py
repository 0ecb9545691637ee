"""Restart of sites: a job's process that died is started again, and takes part in the job again.

NVFlare ends a whole job when a site's process dies, and does not let a site that was restarted
rejoin it. Here such a site has failed in that round, and takes part again in the next.
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

from sluiceway.deploy.nvflare.names import KIT, refuse_tensors
from sluiceway.files import write_atomically

refuse_tensors()

#: In the folder of a job at a site, as long as the site takes part in it: its set-up.
SETUP: Final = "setup.json"
#: Most restarts of the process of one job.
MAX_RESTARTS: Final = 20
#: What a site gets of the other participants when a job begins.
SETUP_KEYS: Final = (SyncKey.COLLAB_INTERFACE, SyncKey.SERVER_FQCN, SyncKey.CLIENT_INTERFACES)


class SiteExecutor(CollabExecutor):  # type: ignore[misc]
    """Collab's executor, which saves its set-up and restores it after a restart."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._parent = os.getppid()

    def execute(self, task: str, data: Any, context: Any, abort: Any) -> Any:
        """Called by NVFlare with each task; the data of the set-up task are saved."""
        reply = super().execute(task, data, context, abort)
        if task == SETUP_TASK_NAME and reply.get_return_code() == ReturnCode.OK:
            setup = {key: data.get(key) for key in SETUP_KEYS}
            write_atomically(setup_of(context), json.dumps(setup))
        return reply

    def _handle_start_run(self, event: str, context: Any) -> None:
        super()._handle_start_run(event, context)
        if setup_of(context).exists():
            setup = Shareable(json.loads(setup_of(context).read_text(encoding="utf-8")))
            super().execute(SETUP_TASK_NAME, setup, context, Signal())

    def _handle_end_run(self, event: str, context: Any) -> None:
        if os.getppid() == self._parent:  # else the site has ended, and not the job
            setup_of(context).unlink(missing_ok=True)
        super()._handle_end_run(event, context)


def setup_of(context: Any) -> Path:
    """The file with this site's set-up in the current job."""
    workspace = context.get_engine().get_workspace()
    return Path(workspace.get_run_dir(context.get_job_id())) / SETUP


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Starts the processes of jobs at a site; again if they die or the site was restarted."""

    def launch_job(self, job_meta: dict[str, Any], context: Any) -> JobHandleSpec:
        """Called by NVFlare when a job begins."""
        workspace = context.get_prop(FLContextKey.WORKSPACE_OBJECT)
        setup = Path(workspace.get_run_dir(job_meta["job_id"])) / SETUP
        return RestartHandle(lambda: super(SiteLauncher, self).launch_job(job_meta, context), setup)

    def handle_event(self, event: str, context: Any) -> None:
        """Called by NVFlare; once the site is connected, it takes part in its jobs again."""
        super().handle_event(event, context)
        if event == EventType.SYSTEM_START:
            workspace = Workspace(os.environ[KIT])
            for setup in Path(workspace.get_root_dir()).glob(f"*/{SETUP}"):
                job = setup.parent.name
                with contextlib.suppress(OSError, ValueError):
                    meta = json.loads(Path(workspace.get_job_meta_path(job)).read_text())
                    context.get_engine().start_app(job, meta)


class RestartHandle(JobHandleSpec):  # type: ignore[misc]
    """The process of a job, replaced by another if it dies while the site takes part in the job.

    Args:
        start: starts a process.
        setup: file that exists as long as the site takes part in the job.
    """

    def __init__(self, start: Callable[[], Any], setup: Path) -> None:
        super().__init__()
        self._start, self._setup = start, setup
        self._over = threading.Event()
        self._handle = start()

    def terminate(self) -> None:
        """End it for good."""
        self._over.set()
        self._setup.unlink(missing_ok=True)
        self._handle.terminate()

    def poll(self) -> Any:
        """How it ended. A crash is not reported, since NVFlare would end the whole job."""
        code = self._handle.poll()
        return JobReturnCode.UNKNOWN if code == JobReturnCode.EXECUTION_ERROR else code

    def wait(self) -> None:
        """Wait until the job is over at this site."""
        self._handle.wait()
        for _ in range(MAX_RESTARTS):
            if self._over.is_set() or not self._setup.exists():
                return
            self._handle = self._start()
            self._handle.wait()
