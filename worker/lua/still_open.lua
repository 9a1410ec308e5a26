-- still_open: strikes settled orders off a mass cancel's list of those left.
--
-- (after fenced.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · 4 how many to look at, at most ·
--       5 how many open ones to meet, at most
-- returns { how many are left, how many of the open ones met the waiters were told are unresolved };
--         empty: it is not this runner's any more
--
-- Those that are open go to the list's end, so that each is met in turn; what was not met counts as left.
-- They are put there before they are taken away: one that is left twice is struck off twice.

local AT_ONCE = 100

local mass = prefix .. ':mass:' .. ARGV[2]
if fenced(ARGV[2], ARGV[3]) then return {} end
local list = mass .. ':left'
local to_look = math.min(tonumber(ARGV[4]), redis.call('LLEN', list))
local met, overdue = 0, 0
while to_look > 0 and met < tonumber(ARGV[5]) do
  local ids, entries, open = redis.call('LRANGE', list, 0, math.min(to_look, AT_ONCE) - 1), {}, {}
  for at, order_id in ipairs(ids) do entries[at] = prefix .. ':entry:' .. order_id end
  if redis.call('EXISTS', unpack(entries)) > 0 then
    for at, order_id in ipairs(ids) do
      local e = redis.call('HMGET', entries[at], 'request', 'reported')
      if e[1] then open[#open + 1] = order_id end
      if e[2] == '1' then overdue = overdue + 1 end
    end
    if #open > 0 then redis.call('RPUSH', list, unpack(open)) end
  end
  redis.call('LTRIM', list, #ids, -1)
  to_look, met = to_look - #ids, met + #open
end
return { redis.call('LLEN', list), overdue }
