"""What one owner has in the kernel: maps, programs and attachments, found again by their pins.

Each release's byte code has a directory of its own, named by a digest over programs and map layouts. Opening a new one takes over
every map of the former whose layout is the same, with all that is in it, and makes new ones for the others; the owner fills these;
`attach` swaps the programs one by one, each from one packet to the next; `retire` removes the former directory. Whoever is killed in
between begins again at the next start, and packets flow by one release's programs or the other's all the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from wincey.bpf import bpffs, program, syscall
from wincey.bpf.attach import Attacher, Attachment
from wincey.bpf.maps import Map
from wincey.bpf.program import Baked
from wincey.bpf.syscall import BpfError


class Objects:
    """Maps, programs and attachments of one owner. directory: see bpffs.owner_directory. tcx: see Attacher.

    `maps` holds the open maps by name, `programs` the descriptors of the loaded programs; both are empty before `open`.
    `fresh`: names of maps that were made anew and are empty.
    """

    def __init__(self, directory: Path, baked: Baked, *, tcx: bool = True) -> None:
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, int] = {}
        self.fresh: set[str] = set()
        self._behind: set[str] = (
            set()
        )  # programs that may have been loaded with a map that another has taken the place of
        self._directory, self._baked = directory, baked
        self._generation = directory / baked.digest
        self._attacher = Attacher(directory, tcx=tcx)

    def __enter__(self) -> Objects:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def exists(self) -> bool:
        """Whether there are pins of this owner, of whatever release."""
        return self._directory.is_dir()

    def open(self) -> None:
        """Open maps and programs by their pins; make, or take over from another release, what is missing. Raises BpfError.

        What is open already and was unpinned meanwhile, as another release does in its `retire`, is pinned again.
        """
        bpffs.ensure_mounted(bpffs.mount_of(self._directory))
        try:
            self._generation.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BpfError(f"directory {self._generation}", error.errno or 0) from None
        for name in self._baked.maps:
            if name not in self.maps:
                self.maps[name] = self._open_map(name)
            self._pin(f"map_{name}", self.maps[name].fd)
        for name, opened in self.programs.items():
            self._pin(f"prog_{name}", opened)
        missing = [name for name in self._baked.programs if name not in self.programs]
        for name in missing:
            fd = syscall.obj_get(str(self._generation / f"prog_{name}"))
            if fd is not None:
                self.programs[name] = fd
        # A program uses the maps it was loaded with: beside a new map it has to be loaded anew.
        absent = [n for n in self._baked.programs if n not in self.programs or n in self._behind]
        for name, fd in program.load(self._baked, self.maps, absent).items():
            (self._generation / f"prog_{name}").unlink(missing_ok=True)
            if (former := self.programs.pop(name, None)) is not None:
                os.close(former)
            self.programs[name] = fd
            self._pin(f"prog_{name}", fd)
            self._behind.discard(name)

    def attach(self, attachments: Iterable[Attachment]) -> None:
        """Have the programs run at these places: attached, replaced, or left if they do. Raises BpfError for the first failure."""
        for attachment in attachments:
            if not self._is_attached(attachment):
                self._attacher.attach(attachment, self.programs[attachment.program])

    def attached(self, attachments: Iterable[Attachment]) -> list[Attachment]:
        """Those of them that are attached with the present programs. Raises BpfError."""
        return [attachment for attachment in attachments if self._is_attached(attachment)]

    def detach(self, attachments: Iterable[Attachment]) -> None:
        """Take our programs away from these places. Raises BpfError."""
        for attachment in attachments:
            self._attacher.detach(attachment)

    def others(self, wanted: Sequence[Attachment]) -> list[Attachment]:
        """All attachments of this owner besides these, whether they work or not."""
        keep = {attachment.place for attachment in wanted}
        return [attachment for attachment in self._attacher.recorded() if attachment.place not in keep]

    def detach_others(self, wanted: Sequence[Attachment]) -> None:
        """Take our programs away from every place that is not one of these. Raises BpfError."""
        self.detach(self.others(wanted))

    def retire(self) -> None:
        """Remove maps and programs of other releases, once no attachment uses them."""
        if self._directory.is_dir():
            for other in self._directory.iterdir():
                if other.is_dir() and other != self._generation:
                    bpffs.remove(other)

    def remove(self) -> None:
        """Detach all programs and unpin them and the maps, of every release. Raises BpfError."""
        if not self.exists:
            self.close()
            return
        with bpffs.alone(self._directory):
            self.detach_others(())
            self.close()
            bpffs.remove(self._directory)

    def close(self) -> None:
        """Release the descriptors; what is pinned stays."""
        maps, self.maps = self.maps, {}
        programs, self.programs = self.programs, {}
        for opened in maps.values():
            opened.close()
        for fd in programs.values():
            os.close(fd)
        self.fresh.clear()
        self._behind.clear()

    def _is_attached(self, attachment: Attachment) -> bool:
        running = self._attacher.attached(attachment)
        return running != 0 and running == syscall.prog_id(self.programs[attachment.program])

    def _open_map(self, name: str) -> Map:
        """By its pin, taken over from another release, or new."""
        layout = self._baked.maps[name]
        pin = self._generation / f"map_{name}"
        others = [other / pin.name for other in self._directory.iterdir() if other.is_dir() and other != pin.parent]
        for place in (pin, *others):
            found = Map.opened(str(place))
            if found and found.layout == layout:
                if place != pin:
                    pin.unlink(missing_ok=True)
                return found
            if found:
                found.close()
        pin.unlink(missing_ok=True)
        self.fresh.add(name)
        self._behind |= {each for each in self._baked.programs if name in self._uses(each)}
        return Map.create(name, layout)

    def _pin(self, name: str, fd: int) -> None:
        """Have it pinned in this release's directory, if it is not."""
        pin = self._generation / name
        if not pin.exists():
            syscall.obj_pin(fd, str(pin))

    def _uses(self, name: str) -> set[str]:
        return {used for _, used in self._baked.programs[name].maps}
