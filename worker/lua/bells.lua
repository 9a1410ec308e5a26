-- bells: wakes a hand up that listens; put before the scripts that bring work.
--
-- Expects `prefix`. Hands wait at P:bell:{lane} (BLPOP); P:ears:{lane} is there while any worker has some. One
-- bell in the list is enough: it lies there only while all hands are busy, and the first that is done takes it.

local function ring(lane)  -- 1: somebody of this lane hears it; 0: nobody listens
  if redis.call('EXISTS', prefix .. ':ears:' .. lane) == 0 then return 0 end
  if redis.call('LLEN', prefix .. ':bell:' .. lane) == 0 then redis.call('LPUSH', prefix .. ':bell:' .. lane, 1) end
  return 1
end
