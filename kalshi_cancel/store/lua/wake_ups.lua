-- wake_ups: wakes a listening sender; put before the scripts that add work.
--
-- Expects `prefix`. Senders wait at P:wake_up:{lane} (BLPOP); P:listeners:{lane} exists while any worker has some. One
-- wake-up in the list is enough: it stays only while all senders are busy, and the first free one takes it.
-- A wake-up that fails decides nothing: the sweeper finds what nobody works on.

local function length(list)  -- 0 where it is not a list
  local found = redis.pcall('LLEN', list)
  return type(found) == 'number' and found or 0
end

local function wake_up(lane)  -- 1: a sender of this lane gets it; 0: nobody listens
  local list = prefix .. ':wake_up:' .. lane
  if redis.pcall('EXISTS', prefix .. ':listeners:' .. lane) ~= 1 then return 0 end
  if length(list) > 0 then return 1 end
  return type(redis.pcall('LPUSH', list, 1)) == 'number' and 1 or 0
end
