# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# cmake -DOUTPUT=<file> -DNVCC_VERSION=<version> -DOBJECTS=<object>,<object>... -P CollectResources.cmake
#
# Puts the ptxas logs of all objects into one file, which lies beside the library and is what tests read.

set(report "# ptxas -v of nvcc ${NVCC_VERSION}\n")
string(REPLACE "," ";" OBJECTS "${OBJECTS}")
foreach(object IN LISTS OBJECTS)
  string(REGEX REPLACE "^.*\\.dir/(\\./)?|\\.o$" "" source "${object}")
  file(READ "${object}.ptxas" log)
  string(APPEND report "\n# ${source}\n${log}")
endforeach()
file(WRITE "${OUTPUT}" "${report}")
