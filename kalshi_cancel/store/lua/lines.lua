-- lines: what waits in each line, and what each bucket holds: what the planner plans by; put before steps.lua.
--
-- Expects `prefix`, `now_ms` and buckets.lua. A line has the due cancels of one lane that one path pays for.

local gone = {}  -- by line: how many of its head this script has taken; their new scores are written at the end
local states = {}  -- of buckets, as this script has left them

local function state(name)
  states[name] = states[name] or bucket_state(name)
  return states[name]
end

local function line(lane, path) return prefix .. ':due:' .. lane .. ':' .. path end

local function number_due(due)
  return redis.call('ZCOUNT', due, '-inf', now_ms) - (gone[due] or 0)
end

local function snapshot(lanes, paths)  -- { { lane, path, when its head is due (ms), number due } .. }, { { bucket, .. } .. }
  local lines, levels, seen = {}, {}, {}
  for _, lane in ipairs(lanes) do
    for _, path in ipairs(paths) do
      local due = line(lane, path)
      local head = redis.call('ZRANGE', due, gone[due] or 0, gone[due] or 0, 'WITHSCORES')
      local at_ms = tonumber(head[2] or '')
      if at_ms then lines[#lines + 1] = { lane, path, at_ms, at_ms <= now_ms and number_due(due) or 0 } end
    end
  end
  local function see(name)
    if seen[name] then return end
    local bucket = state(name)
    seen[name] = true
    -- (in thousandths: Redis hands over whole numbers)
    levels[#levels + 1] = { name, math.floor(bucket.tokens * 1000), math.floor(bucket.capacity * 1000), math.floor(bucket.refill * 1000) }
  end
  see('read')
  see('write')
  for _, path in ipairs(paths) do
    if string.find(path, '^write:%d+$') then see(path) end
  end
  return lines, levels
end
