-- still_open: strikes settled orders off a mass cancel's list of those left.
--
-- ARGV  1 prefix · 2 the mass cancel's id · 3 how many to look at, at most · 4 how many open ones to meet, at most
-- returns { how many are left, how many of the open ones met the waiters were told are unresolved }
--
-- Those that are open go to the list's end, so that each is met in turn; what was not met counts as left.

local AT_ONCE = 100

local list = prefix .. ':mass:' .. ARGV[2] .. ':left'
local to_look = math.min(tonumber(ARGV[3]), redis.call('LLEN', list))
local met, overdue = 0, 0
while to_look > 0 and met < tonumber(ARGV[4]) do
  local ids, entries, open = redis.call('LPOP', list, math.min(to_look, AT_ONCE)), {}, {}
  for at, order_id in ipairs(ids) do entries[at] = prefix .. ':entry:' .. order_id end
  if redis.call('EXISTS', unpack(entries)) > 0 then
    for at, order_id in ipairs(ids) do
      local e = redis.call('HMGET', entries[at], 'request', 'reported')
      if e[1] then open[#open + 1] = order_id end
      if e[2] == '1' then overdue = overdue + 1 end
    end
    if #open > 0 then redis.call('RPUSH', list, unpack(open)) end
  end
  to_look, met = to_look - #ids, met + #open
end
return { redis.call('LLEN', list), overdue }
