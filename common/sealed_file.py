# SPDX-License-Identifier: MIT
"""A file with its SHA-256 in a sidecar, which stays consistent with the file even if the process is killed."""

import hashlib
import os
import shutil
from pathlib import Path

from common.files import sha256_of, sync, temporary_beside, write_text


class SealedFile:
    """A file `name` with its sidecar `name.sha256`, in the format of sha256sum.

    The sidecar is written before the file takes its name. Until then it allows two checksums, that of the new file and
    that of the file it replaces, so that it is valid for whichever of them a killed process leaves.
    """

    def __init__(self, path):
        self.path, self.sidecar = Path(path), Path(f"{path}.sha256")

    def is_intact(self):
        """Whether the file has a checksum that its sidecar allows, or has no sidecar."""
        allowed = self._allowed()
        return not allowed or sha256_of(self.path) in allowed

    def write(self, write):
        """Replaces the file by what write(file) writes. Raises OSError with the file before it intact."""
        with temporary_beside(self.path) as temporary:
            with open(temporary, "wb") as file:
                hashed = _HashedWriter(file)
                try:
                    write(hashed)
                except RuntimeError as error:  # torch.save reports a failed write by an error that does not say why
                    raise hashed.error or error from None
            sync(temporary)
            self._replace(temporary, hashed.sha256.hexdigest())

    def copy_to(self, path):
        """Makes `path` the same sealed file: a hard link, or a copy where the file system has no hard links."""
        other, checksum = SealedFile(path), self.checksum()
        with temporary_beside(other.path) as temporary:
            try:
                os.link(self.path, temporary)
            except OSError:
                shutil.copyfile(self.path, temporary)
                sync(temporary)
            other._replace(temporary, checksum)

    def checksum(self):
        """The checksum of the file. For a damaged file, it is that of the undamaged content."""
        allowed = self._allowed()
        if len(allowed) == 1:
            return allowed[0]
        found = sha256_of(self.path)
        return found if found in allowed or not allowed else allowed[0]

    def _allowed(self):
        """The checksums in the sidecar: one, two if a save was interrupted, none without a sidecar.

        An empty sidecar, which a crash of the machine may leave, allows nothing.
        """
        try:
            lines = self.sidecar.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [line.split()[0] for line in lines if line.strip()] or [""]

    def _replace(self, temporary, checksum):
        """Renames a file on the disk to this one, and updates the sidecar before and after."""
        replaced = [self.checksum()] if self.path.exists() else []
        self._write_sidecar(checksum, *replaced)
        os.replace(temporary, self.path)  # does nothing if both are names of one file; see rename(2)
        sync(self.path.parent)
        if replaced:
            self._write_sidecar(checksum)

    def _write_sidecar(self, *checksums):
        write_text(self.sidecar, "".join(f"{checksum}  {self.path.name}\n" for checksum in checksums))


class _HashedWriter:
    """A writable file that hashes the written data, so that the checksum does not depend on what the disk stores."""

    def __init__(self, file):
        self._file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self._file.flush()
