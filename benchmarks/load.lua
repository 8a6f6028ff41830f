-- What wrk sends: one POST for an employee after the other.
-- Arguments: the workload, a file with names that exist, a seed that no other run has, and perhaps a token.

local LETTERS = "abcdefghilmnorst"
local existing = {}
local body = '{"name": "%s", "department_id": 1, "title": "Analyst"}'

local function word(length)
  local letters = {}
  for at = 1, length do
    local letter = math.random(#LETTERS)
    letters[at] = LETTERS:sub(letter, letter)
  end
  letters[1] = letters[1]:upper()
  return table.concat(letters)
end

-- 20 letters out of 16: no two runs ever meet in one.
local function new()
  return word(8) .. " " .. word(12)
end

local function known()
  return existing[math.random(#existing)]
end

local workloads = {
  new = new,
  existing = known,
  hot = function() return existing[1] end,
  mixed = function() return math.random() < 0.8 and known() or new() end,
}
local pick

function init(arguments)
  pick = workloads[arguments[1]]
  for name in io.lines(arguments[2]) do
    existing[#existing + 1] = name
  end
  math.randomseed(tonumber(arguments[3]))
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  if arguments[4] then
    wrk.headers["Authorization"] = "Bearer " .. arguments[4]
  end
end

function request()
  return wrk.format(nil, nil, nil, body:format(pick()))
end

-- One line for the harness: microseconds, and how many requests took so long, for each that occurred.
-- wrk counts what is not 2xx or 3xx as errors of status.
function done(summary, latency, requests)
  local errors = summary.errors
  local latencies = {}
  for at = 1, #latency do
    latencies[at] = string.format("[%d, %d]", latency(at))
  end
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %f, "latencies": [%s], ' ..
    '"errors": {"status": %d, "connect": %d, "read": %d, "write": %d, "timeout": %d}}\n',
    summary.requests, summary.duration / 1e6, table.concat(latencies, ", "),
    errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end
