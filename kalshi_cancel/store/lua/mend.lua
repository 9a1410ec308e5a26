-- mend: gives entries a place in line that have none.
--
-- (after gather.lua, wake_ups.lua, place.lua) rows: order_id
-- returns how many had none

local mended, lanes = 0, {}
for order_id in rows(1) do
  local e = fields(prefix .. ':pending:' .. order_id, 'request', 'lane', 'path')
  if e and e[1] and place(order_id, e[2], e[3]) then
    mended = mended + 1
    lanes[e[2] == 'strategy' and 'strategy' or 'risk'] = true
  end
end
flush()
for lane in pairs(lanes) do wake_up(lane) end
return mended
