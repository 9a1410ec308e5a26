-- still_open: strikes settled orders off a mass cancel's list of those left.
--
-- (after gather.lua, fenced.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · 4 how many to look at, at most ·
--       5 how many open ones to meet, at most
-- returns { how many are left, how many of the open ones are reported unresolved };
--         empty: it is not this runner's any more
--
-- Those that are open go to the list's end, so that each is met in turn; what was not met counts as left.

local AT_ONCE = 100

local mass = prefix .. ':mass:' .. ARGV[2]
if fenced(ARGV[2], ARGV[3]) then return {} end
local list = mass .. ':left'
local left = redis.call('LLEN', list)
local to_look, looked = math.min(tonumber(ARGV[4]), left), 0
local met, overdue = 0, 0
while to_look > 0 and met < tonumber(ARGV[5]) do
  local ids, entries, open = redis.call('LRANGE', list, looked, looked + math.min(to_look, AT_ONCE) - 1), {}, {}
  for at, order_id in ipairs(ids) do entries[at] = prefix .. ':pending:' .. order_id end
  if redis.call('EXISTS', unpack(entries)) > 0 then
    for at, order_id in ipairs(ids) do
      local e = fields(entries[at], 'request', 'reported') or { true }  -- (what is spoilt is open until it is set aside)
      if e[1] then open[#open + 1] = order_id end
      if e[2] == '1' then overdue = overdue + 1 end
    end
    for _, order_id in ipairs(open) do gather('RPUSH', list, order_id) end
  end
  to_look, looked, met = to_look - #ids, looked + #ids, met + #open
end
if looked > 0 then write('LTRIM', list, looked, -1) end
flush()
return { left - looked + met, overdue }
