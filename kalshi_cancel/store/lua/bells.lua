-- bells: wakes a hand up that listens; put before the scripts that bring work.
--
-- Expects `prefix`. Hands wait at P:bell:{lane} (BLPOP); P:ears:{lane} is there while any worker has some. One
-- bell in the list is enough: it lies there only while all hands are busy, and the first that is done takes it.
-- A bell that cannot be rung decides nothing: the sweep finds what nobody comes for.

local function length(list)  -- 0 where it cannot be told
  local found = redis.pcall('LLEN', list)
  return type(found) == 'number' and found or 0
end

local function ring(lane)  -- 1: somebody of this lane hears it; 0: nobody listens
  local bell = prefix .. ':bell:' .. lane
  if redis.pcall('EXISTS', prefix .. ':ears:' .. lane) ~= 1 then return 0 end
  if length(bell) > 0 then return 1 end
  return type(redis.pcall('LPUSH', bell, 1)) == 'number' and 1 or 0
end
