"""Startup kits: configuration, certificate and key of the server, each site and the admin."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sluiceway.errors import InputError
from sluiceway.transport.tls import Credentials

#: Organisation in all certificates; NVFlare grants rights by role, of which one is used.
ORG: Final = "sluiceway"
PROJECT: Final = "sluiceway"
#: NVFlare's driver. Its own on TCP does the TLS handshake where it accepts, so that one stranger
#: who says nothing keeps every site out.
SCHEME: Final = "grpc"
#: The only classes that a job may name. No job can bring code.
CLASSES: Final = (
    "nvflare.collab.runtime.controller.CollabController",
    "sluiceway.deploy.nvflare.controller.ServerController",
    "sluiceway.deploy.nvflare.executor.ClientExecutor",
    "sluiceway.deploy.nvflare.restart.SiteExecutor",
)
LAUNCHER: Final = "sluiceway.deploy.nvflare.restart.SiteLauncher"
#: Rights of the admin at sites, and more rights at the server.
RIGHTS: Final = ("submit_job", "manage_job", "view")
SERVER_RIGHTS: Final = ("download_job", "operate", "app_command")


@dataclass(frozen=True)
class Kit:
    """A startup kit.

    Attributes:
        folder: of the kit.
        role: "server", "site" or "admin".
        name: the common name in its certificate.
    """

    folder: Path
    role: str
    name: str

    @property
    def keys(self) -> Credentials:
        """The paths of its certificate, its key and the root certificate."""
        stem = "server" if self.role == "server" else "client"
        startup = self.folder / "startup"
        return Credentials(startup / f"{stem}.crt", startup / f"{stem}.key", startup / "rootCA.pem")

    @property
    def address(self) -> tuple[str, int]:
        """The server's name and port, as sites reach it."""
        if self.role == "admin":
            place = table_of(self.folder / "startup" / "fed_admin.json")["admin"]
            return str(place["host"]), int(place["port"])
        file = f"fed_{'server' if self.role == 'server' else 'client'}.json"
        target = table_of(self.folder / "startup" / file)["servers"][0]["service"]["target"]
        host, port = str(target).rsplit(":", 1)
        return host, int(port)


def table_of(path: Path) -> dict[str, Any]:
    """A file of a kit. Raises InputError if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return found


def read_kit(folder: Path) -> Kit:
    """The kit in a folder. Raises InputError if there is none."""
    folder = folder.resolve()
    startup = folder / "startup"
    if (startup / "fed_server.json").exists():
        return Kit(folder, "server", "server")
    for role, file in (("site", "fed_client.json"), ("admin", "fed_admin.json")):
        if (startup / file).exists():
            return Kit(folder, role, common_name(startup / "client.crt"))
    raise InputError(f"{folder} is not a startup kit; see `sluiceway deploy nvflare provision`")


def common_name(certificate: Path) -> str:
    """The common name in a certificate. Raises InputError if it cannot be read."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{certificate} cannot be read: {error}") from None
    name = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
    return name if isinstance(name, str) else name.decode()


def provision(
    out: Path,
    host: str,
    port: int,
    sites: Sequence[str],
    admin: str,
    classes: Sequence[str] = CLASSES,
) -> list[Kit]:
    """Make kits for a server, its sites and the admin who submits.

    Args:
        out: folder for them: `server`, `admin` and `sites/NAME`, and `authority`, which holds the
            root key that signs them. With the same folder again, more sites get kits of the same
            root, and existing kits stay as they are.
        host: the server's name, as sites reach it.
        port: on the server, for all traffic.
        sites: their names.
        admin: name of the admin, in the form of an e-mail address.
        classes: that a job may name.

    Raises:
        InputError: a name cannot be used.
    """
    where = {"server": out / "server", "admin": out / "admin"}
    where |= {site: out / "sites" / site for site in sites}
    made = nvflare_kits(out / "authority", host, port, sites, admin)
    kits = []
    for name, folder in where.items():
        if not folder.exists():
            source = {"server": host, "admin": admin}.get(name, name)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made / source, folder)
            restrict(folder, name, classes)
        kits.append(read_kit(folder))
    forget_keys(out / "authority")
    return kits


def forget_keys(authority: Path) -> None:
    """Leave no private key but the root's with the authority: each is in its owner's kit."""
    for folder in (authority / PROJECT).glob("prod_*"):
        shutil.rmtree(folder)
    path = authority / PROJECT / "state" / "cert.json"
    state = table_of(path)
    roots = {name: value for name, value in state.items() if not isinstance(value, dict)}
    write(path, roots)
    path.chmod(0o600)


def nvflare_kits(work: Path, host: str, port: int, sites: Sequence[str], admin: str) -> Path:
    """NVFlare's own kits, each in a folder of its name. Raises InputError."""
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.signature import SignatureBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provision import prepare_project
    from nvflare.lighter.provisioner import Provisioner

    server: dict[str, Any] = {"name": host, "type": "server", "org": ORG}
    server |= {"fed_learn_port": port, "admin_port": port}
    clients = [{"name": site, "type": "client", "org": ORG} for site in sites]
    person = {"name": admin, "type": "admin", "org": ORG, "role": "project_admin"}
    project = {"api_version": 3, "name": PROJECT, "participants": [server, *clients, person]}
    builders = [
        WorkspaceBuilder(template_file=["master_template.yml"]),
        StaticFileBuilder(config_folder="config", scheme=SCHEME),
        CertBuilder(),
        SignatureBuilder(),
    ]
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found = Provisioner(str(work), builders, None).provision(prepare_project(project))
    except Exception as error:
        raise InputError(f"kits cannot be made: {error}") from error
    if found is None or found.get("__errors__"):
        raise InputError(f"kits cannot be made: {' '.join(said.getvalue().split())[-300:]}")
    return Path(found["current_prod_dir"])


def restrict(folder: Path, name: str, classes: Sequence[str]) -> None:
    """Allow only classes of Sluiceway, and no code that comes with a job."""
    folder.chmod(0o700)
    local = folder / "local"
    default = local / "resources.json.default"
    if name == "admin":
        return
    settings = json.loads(default.read_text(encoding="utf-8"))
    settings |= {"class_list_enforcement_mode": "enforce", "class_allow_list": list(classes)}
    if name == "server":
        for part in settings["components"]:
            if part["id"] == "job_scheduler":
                part["args"] |= {"min_schedule_interval": 1.0}  # look for jobs every second
    else:
        settings["allow_log_streaming"] = False
        parts = [part for part in settings["components"] if part["id"] != "site_log_streamer"]
        for part in parts:
            if part["id"] == "process_launcher":
                part["path"] = LAUNCHER
        settings["components"] = parts
    write(local / "resources.json", settings)
    rights = dict.fromkeys([*RIGHTS, *(SERVER_RIGHTS if name == "server" else ())], "any")
    rights |= dict.fromkeys(("byoc", "shell_commands"), "none")
    permissions = {"format_version": "1.0", "permissions": {"project_admin": rights}}
    write(local / "authorization.json", permissions)


def localise(kit: Kit) -> None:
    """Have a server keep its jobs in its kit, wherever the kit was moved."""
    if kit.role != "server":
        return
    path = kit.folder / "local" / "resources.json"
    settings = table_of(path)
    store = settings["snapshot_persistor"]["args"]["storage"]["args"]
    store["root_dir"] = str(kit.folder / "snapshots")
    for part in settings["components"]:
        if part["id"] == "job_manager":
            part["args"]["uri_root"] = str(kit.folder / "jobs")
    write(path, settings)


def write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2), encoding="utf-8")
