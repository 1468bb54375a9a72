-- Tell hooks: wrk … -s hooks.lua URL -- BODY HOOKS HEADER… The last line printed is for load.py.
-- "{n}" in the body and the headers is another number each time. The URL gets the number of a hook, in turns; "{hook}"
-- in the headers is this number.

local body, hooks, headers, turn, start = "", 1, {}, 0, os.time() .. "-"

function init(args)
  body, hooks = args[1], tonumber(args[2])
  for at = 3, #args do
    local name, value = args[at]:match("^([^:]+): (.*)$")
    headers[name] = value
  end
  headers["Content-Type"] = "application/json"
end

function request()
  turn = turn + 1
  local n, hook = start .. turn, tostring(turn % hooks)
  local told = {}
  for name, value in pairs(headers) do told[name] = value:gsub("{n}", n):gsub("{hook}", hook) end
  return wrk.format("POST", wrk.path .. hook, told, (body:gsub("{n}", n)))
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "failures": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
