-- reply_rest: replies to further waiters of orders that have more of them than one script replies to.
--
-- (after gather.lua, reply.lua) asked: record_prefix · life_s; rows: order_id
-- returns how many got a reply
--
-- They get the record that is there. While the order is open they stay, for what becomes of it;
-- its field `replied` says how many of them know that it is unresolved.

local record_prefix, life_s, all_replied = asked.record_prefix, asked.life_s, 0
for order_id in rows(1) do
  local entry, waiters = prefix .. ':pending:' .. order_id, prefix .. ':waiters:' .. order_id
  local open = fields(entry, 'request', 'reported', 'replied') or {}
  local first = open[1] and tonumber(open[3] or 0) or 0
  local record = redis.call('GET', record_prefix .. order_id)
  local text = record and without_task_id(record)
  if open[1] and open[2] ~= '1' then
    gather('SREM', prefix .. ':replies_left', order_id)  -- asked for again: there will be another record
  elseif not text then
    gather('SREM', prefix .. ':replies_left', order_id)  -- it is over; they have waited longer than results are kept
  elseif replies_left > 0 then
    local further = redis.call('ZRANGE', waiters, first, first + replies_left - 1)
    replies_left, all_replied = replies_left - #further, all_replied + #further
    reply(record_prefix, life_s, order_id, text, further)
    if open[1] then
      write('HSET', entry, 'replied', first + #further)
    elseif #further > 0 then
      write('ZREMRANGEBYRANK', waiters, 0, #further - 1)
    end
    if redis.call('ZCARD', waiters) <= first + #further then gather('SREM', prefix .. ':replies_left', order_id) end
  end
end
flush()
return all_replied
