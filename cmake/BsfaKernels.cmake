# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# One object library an architecture, so that no file is compiled for an architecture it cannot run on, and the
# tables of kernels that csrc/dispatch.cpp includes.

find_program(BSFA_CCACHE ccache)
set(BSFA_TARGETS_80 ${BSFA_SM80_TARGETS})
set(BSFA_TARGETS_90a 90a-real)
set(BSFA_ELEMENT_float16 cutlass::half_t)
set(BSFA_ELEMENT_bfloat16 cutlass::bfloat16_t)

# bsfa_add_cuda_sources(<target> <part> <architectures> <source>...)
#
# Compiles the sources for exactly these architectures, in the object library <target>_<part>, and adds them to
# <target>. What ptxas says of each kernel is kept beside its object, in <object>.ptxas.
function(bsfa_add_cuda_sources target part architectures)
  set(objects ${target}_${part})
  if(NOT TARGET ${objects})
    set(launchers "${BSFA_MODULES}/keep_ptxas_log.sh")
    if(BSFA_CCACHE)
      list(APPEND launchers "${BSFA_CCACHE}")
    endif()
    add_library(${objects} OBJECT)
    target_link_libraries(${objects} PRIVATE ${target}_build CUTLASS::CUTLASS)
    set_target_properties(${objects} PROPERTIES
      CUDA_ARCHITECTURES "${architectures}" CUDA_COMPILER_LAUNCHER "${launchers}"
      CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON)
    target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:${objects}>)
    set_property(TARGET ${target} APPEND PROPERTY BSFA_OBJECTS $<TARGET_OBJECTS:${objects}>)
  endif()
  target_sources(${objects} PRIVATE ${ARGN})
endfunction()

# bsfa_add_kernel(<target> <forward|block_maxima|select_blocks|attend_blocks> <80|90a> <dtype> <head_dim> <source>)
#
# Adds one instantiation, bsfa::sm<80|90>::<name><Element, head_dim>, where the options ask for it.
function(bsfa_add_kernel target name architecture dtype head_dim source)
  if(NOT BSFA_HAS_CUDA OR NOT architecture IN_LIST BSFA_ARCHITECTURES OR NOT dtype IN_LIST BSFA_DTYPES
     OR NOT head_dim IN_LIST BSFA_HEAD_DIMS)
    return()
  endif()
  string(TOUPPER ${dtype} code)
  string(REGEX MATCH "^[0-9]+" number ${architecture})
  bsfa_add_cuda_sources(${target} sm${number} "${BSFA_TARGETS_${architecture}}" ${source})
  set_property(TARGET ${target} APPEND_STRING PROPERTY BSFA_ROWS_${name}
    "    {${number}, BSFA_${code}, ${head_dim}, sm${number}::${name}<${BSFA_ELEMENT_${dtype}}, ${head_dim}>},\n")
endfunction()

# bsfa_write_tables(<target>): call it after the last bsfa_add_kernel().
function(bsfa_write_tables target)
  foreach(name IN ITEMS forward block_maxima select_blocks attend_blocks)
    get_target_property(rows ${target} BSFA_ROWS_${name})
    if(NOT rows)
      set(rows "")
    endif()
    file(CONFIGURE OUTPUT generated/${name}_kernels.inc CONTENT "@rows@" @ONLY)
  endforeach()
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/generated")
endfunction()
