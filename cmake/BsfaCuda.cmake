# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# Enables CUDA as BSFA_CUDA says, and sets BSFA_HAS_CUDA. Looks at the version of nvcc before CMake tries it, so
# that what is missing is said in words.

set(BSFA_NVCC_MINIMUM 12.4)
set(BSFA_HAS_CUDA FALSE)

# bsfa_find_nvcc(<variable for the path> <variable for what is wrong, or "">)
function(bsfa_find_nvcc path_variable problem_variable)
  set(nvcc "$ENV{CUDACXX}")
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  endif()
  if(nvcc STREQUAL "")
    find_program(nvcc_program nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
      PATHS /usr/local/cuda /opt/cuda NO_CACHE)
    set(nvcc "${nvcc_program}")
  endif()
  set(problem "")
  if(NOT nvcc)
    set(problem "nvcc was not found on the PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda")
  else()
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE banner RESULT_VARIABLE status ERROR_VARIABLE banner)
    if(NOT status EQUAL 0 OR NOT banner MATCHES "release ([0-9]+\\.[0-9]+)")
      set(problem "${nvcc} --version failed: ${status} ${banner}")
    elseif(CMAKE_MATCH_1 VERSION_LESS BSFA_NVCC_MINIMUM)
      set(problem "${nvcc} is of CUDA ${CMAKE_MATCH_1}")
    endif()
  endif()
  set(${path_variable} "${nvcc}" PARENT_SCOPE)
  set(${problem_variable} "${problem}" PARENT_SCOPE)
endfunction()

if(NOT BSFA_CUDA STREQUAL "OFF")
  bsfa_find_nvcc(nvcc problem)
  if(problem STREQUAL "")
    set(CMAKE_CUDA_COMPILER "${nvcc}")
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80)  # each target names its own
    endif()
    enable_language(CUDA)
    set(BSFA_HAS_CUDA TRUE)
  elseif(BSFA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "The CUDA kernels need nvcc ${BSFA_NVCC_MINIMUM} or newer: ${problem}. "
      "Install the CUDA toolkit, name another nvcc in CUDACXX, or build without kernels (BSFA_CUDA=OFF).")
  else()
    message(WARNING "Building libbsfa WITHOUT CUDA kernels: they need nvcc ${BSFA_NVCC_MINIMUM} or newer, and "
      "${problem}. The reference back end on CPU will work; CUDA tensors will be refused. "
      "BSFA_CUDA=ON turns this warning into an error.")
  endif()
endif()
