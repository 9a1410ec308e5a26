-- claim: takes what is due into one hand, the first lane first, oldest first, for the time of a lease.
--
-- ARGV  1 prefix · 2 how many at most · 3 lease, ms · 4 this moment on the exchange's clock, ms (empty: not
--       known) · then two for each lane, the most urgent first: lane · key of its queue
-- returns { this moment (ms), messages waiting in the queues, when the next entry of these lanes is due (ms, 0: none; a moment that has
--           passed tells that more could have been claimed),
--           a list of { order_id, token, request, learned, sent, first_sent_ms, lane, accepted_ms,
--                       deadline_ms, reported } }
--
-- An entry whose lease ran out is due like any other. Claiming records that an attempt is about to be sent:
-- `sent` is what it was before this claim, so 1 tells that a claimer vanished and an answer may be lost.
-- The token fences: only the latest claim's token settles, extends or gives back.

local prefix, left, lease_ms, exchange_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local claimed, next_due_ms, waiting = {}, 0, 0

for at = 5, #ARGV, 2 do
  local due = prefix .. ':due:' .. ARGV[at]
  if left > 0 then
    local ids = redis.call('ZRANGEBYSCORE', due, '-inf', now_ms, 'LIMIT', 0, left)
    for _, order_id in ipairs(ids) do
      local entry = prefix .. ':entry:' .. order_id
      local e = redis.call('HMGET', entry, 'request', 'learned', 'sent', 'first_sent_ms', 'lane',
        'accepted_ms', 'deadline_ms', 'reported')
      if not e[1] then
        redis.call('ZREM', due, order_id)  -- an index without its entry: somebody deleted keys by hand
      else
        local token = redis.call('INCR', prefix .. ':fence')
        redis.call('HSET', entry, 'token', token, 'sent', 1)
        if not e[4] then redis.call('HSET', entry, 'first_sent_ms', exchange_ms) end
        redis.call('ZADD', due, 'XX', now_ms + lease_ms, order_id)
        claimed[#claimed + 1] = { order_id, token, e[1], e[2], e[3], e[4] or exchange_ms, e[5], e[6], e[7], e[8] }
      end
    end
    left = left - #ids
  end
  local first = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
  if first[2] and (next_due_ms == 0 or tonumber(first[2]) < next_due_ms) then next_due_ms = tonumber(first[2]) end
  waiting = waiting + redis.call('LLEN', ARGV[at + 1])
  redis.call('SET', prefix .. ':claimed_ms:' .. ARGV[at], now_ms, 'PX', 60000)
end
return { now_ms, waiting, next_due_ms, claimed }
