"""The systemd unit of an agent, hardened: it writes to its own folder and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

from consortium.client.home import Home
from consortium.protocol.errors import InputError

_UNIT = """\
# Put this into /etc/systemd/system/consortium-client.service, set User=, then:
#   systemctl daemon-reload && systemctl enable --now consortium-client
[Unit]
Description=Consortium client of site {site} in federation {federation}
Wants=network-online.target
After=network-online.target

[Service]
User=CHANGE-ME
ExecStart="{program}" client start --dir "{folder}"
Restart=always
RestartSec=5
TimeoutStopSec=10
UMask=0077
ReadWritePaths="{folder}"
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
LimitCORE=0
KillMode=control-group

[Install]
WantedBy=multi-user.target
"""


def systemd_unit(home: Home) -> str:
    """The text of the unit.

    Raises:
        InputError: the site has not joined, or a path has signs that a unit cannot hold.
    """
    config = home.config
    program = Path(sys.executable).with_name("consortium")
    for path in (program, home.folder):
        if any(sign in str(path) for sign in '"\\\n%$'):
            raise InputError(
                f"{path}: a unit cannot hold this path; use one without quotes, %, $ and backslashes"
            )
    return _UNIT.format(site=config.site, federation=config.federation, program=program, folder=home.folder)
