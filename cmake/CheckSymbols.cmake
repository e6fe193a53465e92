# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# cmake -DNM=<nm> -DLIBRARY=<shared library> -P CheckSymbols.cmake
#
# Fails where the library exports anything but bsfa_*: another copy of the CUDA runtime or of the C++ library in
# the process must never bind to ours.

foreach(required IN ITEMS NM LIBRARY)
  if(NOT ${required})
    message(FATAL_ERROR "CheckSymbols.cmake needs -D${required}=...")
  endif()
endforeach()

execute_process(COMMAND "${NM}" -D --defined-only "${LIBRARY}"
  OUTPUT_VARIABLE output RESULT_VARIABLE status ERROR_VARIABLE error)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${NM} could not read ${LIBRARY}: ${error}")
endif()

string(REGEX MATCHALL "[^\n]+" lines "${output}")
set(foreign "")
set(exported 0)
foreach(line IN LISTS lines)
  string(REGEX REPLACE "^.* " "" symbol "${line}")
  if(symbol MATCHES "^bsfa_[a-z_]+$")
    math(EXPR exported "${exported} + 1")
  else()
    string(APPEND foreign "\n  ${symbol}")
  endif()
endforeach()

if(NOT foreign STREQUAL "")
  message(FATAL_ERROR "${LIBRARY} must export nothing but bsfa_*, and exports${foreign}")
endif()
if(exported EQUAL 0)
  message(FATAL_ERROR "${LIBRARY} exports no bsfa_* at all")
endif()
