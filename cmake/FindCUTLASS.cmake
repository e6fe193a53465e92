# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# Finds the CUTLASS headers and makes CUTLASS::CUTLASS. They are looked for in CUTLASS_ROOT (a checkout or an
# installation), then in the PyPI package nvidia-cutlass of the Python that runs the build.

set(CUTLASS_ROOT "" CACHE PATH "CUTLASS headers; empty: those of the PyPI package nvidia-cutlass")

if(CUTLASS_ROOT)
  set(CUTLASS_INCLUDE_DIR "${CUTLASS_ROOT}/include")
  set(looked_in "CUTLASS_ROOT=${CUTLASS_ROOT}")
else()
  find_package(Python COMPONENTS Interpreter REQUIRED QUIET)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(CUTLASS_INCLUDE_DIR "${package}/source/include")
  set(looked_in "the packages of ${Python_EXECUTABLE}")
endif()

# The directory is not cached: an isolated build has another one every time.
set(CUTLASS_VERSION "")
set(version_header "${CUTLASS_INCLUDE_DIR}/cutlass/version.h")
if(EXISTS "${version_header}")
  file(STRINGS "${version_header}" defines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" numbers "${defines}")
  string(REPLACE ";" "." CUTLASS_VERSION "${numbers}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CUTLASS
  REQUIRED_VARS CUTLASS_INCLUDE_DIR CUTLASS_VERSION VERSION_VAR CUTLASS_VERSION
  REASON_FAILURE_MESSAGE "no cutlass/version.h in ${looked_in}: pip install nvidia-cutlass, or set CUTLASS_ROOT")

if(CUTLASS_FOUND AND NOT TARGET CUTLASS::CUTLASS)
  add_library(CUTLASS::CUTLASS INTERFACE IMPORTED)
  set_target_properties(CUTLASS::CUTLASS PROPERTIES
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${CUTLASS_INCLUDE_DIR}"
    INTERFACE_INCLUDE_DIRECTORIES "${CUTLASS_INCLUDE_DIR}")
endif()
