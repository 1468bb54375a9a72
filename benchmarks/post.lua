-- One POST over and over: wrk … -s post.lua URL -- BODY TOKEN ROOMS TOKENS [PREFER]. The last line printed is for load.py.
-- "!room" in the URL becomes !room0, !room1 …, in turns: in one room events go one after another. "{n}" in the
-- token is the number of one of them, in turns, too. Each run begins at another room, so that several short ones come to
-- all of many rooms.

local requests, turn = {}, 0

function init(args)
  local headers = { ["Content-Type"] = "application/json" }
  if args[5] then headers["Prefer"] = args[5] end
  local rooms, tokens = tonumber(args[3]), tonumber(args[4])
  for n = 0, math.max(rooms, tokens) - 1 do
    headers["Authorization"] = "Bearer " .. args[2]:gsub("{n}", n % tokens)
    requests[n] = wrk.format("POST", wrk.path:gsub("%%21room", "%%21room" .. n % rooms), headers, args[1])
  end
  math.randomseed(os.time())
  turn = math.random(0, #requests)
end

function request()
  turn = (turn + 1) % (#requests + 1)
  return requests[turn]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "failures": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
