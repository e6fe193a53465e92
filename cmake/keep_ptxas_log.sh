#!/bin/sh
# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# keep_ptxas_log.sh <compiler> <argument>...
#
# Compiles, and keeps what ptxas -v says (registers, spills, shared memory, barriers) in <object>.ptxas instead of
# on the screen, where only warnings and errors remain.
object=
previous=
for argument in "$@"; do
  if [ "$previous" = -o ]; then
    object=$argument
  fi
  previous=$argument
done
if [ -z "$object" ]; then
  exec "$@"
fi

"$@" 2>"$object.ptxas"
status=$?
grep -Ev '^(ptxas info|    [0-9]+ bytes stack frame|Compile time = )' "$object.ptxas" >&2
exit $status
