-- still_open: strikes settled orders off a mass cancel's list of those left.
--
-- (after gather.lua, fenced.lua) asked: id · token · look_at_most · meet_at_most (of those that are open)
-- returns { how many are left, how many of the open ones are reported unresolved };
--         empty: it is not this runner's any more
--
-- Those that are open go to the list's end, so that each is met in turn; what was not met counts as left.

local AT_ONCE = 100

local mass = prefix .. ':mass:' .. asked.id
if fenced(asked.id, asked.token) then return {} end
local list = mass .. ':left'
local left = redis.call('LLEN', list)
local to_look, looked = math.min(asked.look_at_most, left), 0
local met, overdue = 0, 0
while to_look > 0 and met < asked.meet_at_most do
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
