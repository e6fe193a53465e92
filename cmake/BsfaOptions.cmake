# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# What to build. Each option is a cache variable that a user may set; where it is empty, the preset decides. The
# chosen values stand in normal variables of the same names, so that another preset in the same build directory
# is not met by the values of the last one.

set(BSFA_CUDA "AUTO" CACHE STRING "CUDA kernels: AUTO (where there is an nvcc that can), ON (or fail), OFF")
set(BSFA_PRESET "release" CACHE STRING "Which kernels: release (all), ci (one type), dev (one type, Hopper)")
option(BSFA_LINEINFO "Keep source lines in the kernels, for profilers" OFF)
option(BSFA_WERROR "A warning in C++ ends the build" OFF)
set_property(CACHE BSFA_CUDA PROPERTY STRINGS AUTO ON OFF)
set_property(CACHE BSFA_PRESET PROPERTY STRINGS release ci dev)

if(NOT BSFA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "BSFA_CUDA must be AUTO, ON or OFF, got ${BSFA_CUDA}")
endif()

# bsfa_option(<name> <description> ALLOWED <values> RELEASE <values> CI <values> DEV <values>)
#
# A list that is a subset of ALLOWED, and what it is in each preset.
function(bsfa_option name description)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "ALLOWED;RELEASE;CI;DEV")
  set(${name} "" CACHE STRING "${description}; empty: as the preset says")
  string(TOUPPER "${BSFA_PRESET}" preset)
  if(NOT preset MATCHES "^(RELEASE|CI|DEV)$")
    message(FATAL_ERROR "BSFA_PRESET must be release, ci or dev, got ${BSFA_PRESET}")
  endif()
  set(values "$CACHE{${name}}")
  string(REPLACE "," ";" values "${values}")
  if(values STREQUAL "")
    set(values ${arg_${preset}})
  endif()
  foreach(value IN LISTS values)
    if(NOT value IN_LIST arg_ALLOWED)
      list(JOIN arg_ALLOWED ", " allowed)
      message(FATAL_ERROR "${name} must name some of ${allowed}, got ${value}")
    endif()
  endforeach()
  set(${name} "${values}" PARENT_SCOPE)
endfunction()

bsfa_option(BSFA_ARCHITECTURES "Architectures to write kernels for"
  ALLOWED 80 90a  RELEASE 80 90a  CI 80 90a  DEV 90a)
bsfa_option(BSFA_DTYPES "Element types"
  ALLOWED float16 bfloat16  RELEASE float16 bfloat16  CI bfloat16  DEV float16)
bsfa_option(BSFA_HEAD_DIMS "Head dimensions"
  ALLOWED 64 128 256  RELEASE 64 128 256  CI 128  DEV 128)
# The sm_80 kernels run on an H100 without being compiled at load (90-real), and as PTX on whatever comes later.
bsfa_option(BSFA_SM80_TARGETS "What the sm_80 kernels are compiled for"
  ALLOWED 80-real 90-real 80-virtual  RELEASE 80-real 90-real 80-virtual  CI 80-real  DEV 80-real)
