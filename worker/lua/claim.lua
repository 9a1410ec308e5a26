-- claim: takes tokens and, for the time of a lease, what they pay for: one call's worth of due entries.
--
-- (after buckets.lua) ARGV  1 prefix · 2 how many orders at most in one call · 3 lease, ms · 4 this moment on
--       the exchange's clock, ms (empty: not known) · 5 share of a write bucket that is kept for risk ·
--       6 cost of a cancel · 7 cost of a read · then two for each lane, the most urgent first: lane · its queue
-- returns { this moment (ms), messages waiting in the queues, when the next entry is due (ms, 0: none; a
--           moment that has passed: more could be claimed), wait for tokens (ms, 0: none is held up),
--           bucket paid from, tokens paid,
--           a list of { order_id, token, request, learned, sent, first_sent_ms, lane, accepted_ms,
--                       deadline_ms, reported } }
--
-- The lanes in turn, and within a lane the path whose head has waited longest. Paths: `read` one read-back;
-- `write` as many cancels as the unscoped bucket pays for, in one call, filled up from the shards' paths;
-- `write:N` one cancel of shard N from its own bucket, or, when nothing else wants the unscoped bucket, many
-- from that. An entry whose lease ran out is due like any other. `sent` is what it was before this claim, so
-- 1 tells that a claimer vanished and an answer may be lost. The token fences: only the latest claim's
-- token settles, extends or gives back.

local lease_ms, exchange_ms, share = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local cancel_cost, read_cost = tonumber(ARGV[6]), tonumber(ARGV[7])
local at_most = tonumber(ARGV[2])
local now_ms = math.floor(now_us / 1000)
local claimed, waiting, held_up_ms, paid_bucket, paid = {}, 0, 0, '', 0
local paths = redis.call('SMEMBERS', prefix .. ':paths')
local states = {}

local function state(name)
  states[name] = states[name] or bucket_state(name)
  return states[name]
end

local function affordable(name, cost, lane)
  local bucket = state(name)
  local reserve = lane == 'strategy' and share * bucket.capacity or 0
  local orders = math.floor((bucket.tokens - reserve) / cost)
  if orders < 1 then
    local wait = wait_ms(bucket, cost, reserve)
    if held_up_ms == 0 or wait < held_up_ms then held_up_ms = wait end
    return 0
  end
  return orders
end

local function claim(lane, path, count)
  local due = prefix .. ':due:' .. lane .. ':' .. path
  local ids = redis.call('ZRANGEBYSCORE', due, '-inf', now_ms, 'LIMIT', 0, count)
  for _, order_id in ipairs(ids) do
    local entry = prefix .. ':entry:' .. order_id
    local e = redis.call('HMGET', entry, 'request', 'learned', 'sent', 'first_sent_ms', 'lane',
      'accepted_ms', 'deadline_ms', 'reported')
    if not e[1] then
      redis.call('ZREM', due, order_id)  -- an index without its entry: somebody deleted keys by hand
    else
      local token = redis.call('INCR', prefix .. ':fence')
      if e[4] then
        redis.call('HSET', entry, 'token', token, 'sent', 1)
      else
        redis.call('HSET', entry, 'token', token, 'sent', 1, 'first_sent_ms', exchange_ms)
      end
      redis.call('ZADD', due, 'XX', now_ms + lease_ms, order_id)
      claimed[#claimed + 1] = { order_id, token, e[1], e[2], e[3], e[4] or exchange_ms, e[5], e[6], e[7], e[8] }
    end
  end
end

local function pay(name, cost)
  paid_bucket, paid = name, cost * #claimed
  if paid > 0 then put(state(name), state(name).tokens - paid) end
end

local function due_paths(lane)  -- those with something due, the longest waiting head first
  local heads = {}
  for _, path in ipairs(paths) do
    local head = redis.call('ZRANGE', prefix .. ':due:' .. lane .. ':' .. path, 0, 0, 'WITHSCORES')
    if head[2] and tonumber(head[2]) <= now_ms then heads[#heads + 1] = { path = path, at = tonumber(head[2]) } end
  end
  table.sort(heads, function(a, b) return a.at < b.at end)
  return heads
end

local function take_from(lane)
  local heads = due_paths(lane)
  local unscoped_wanted, shards = false, {}
  for _, head in ipairs(heads) do
    if head.path == 'write' then unscoped_wanted = true end
    if string.sub(head.path, 1, 6) == 'write:' then shards[#shards + 1] = head.path end
  end
  local function in_one_call(first)  -- a batch from the unscoped bucket, of the first path and then the shards'
    local orders = math.min(at_most, affordable('write', cancel_cost, lane))
    if first and orders > 0 then claim(lane, first, orders) end
    for _, path in ipairs(shards) do
      if #claimed < orders then claim(lane, path, orders - #claimed) end
    end
    return orders
  end
  for _, head in ipairs(heads) do
    if head.path == 'read' then
      if affordable('read', read_cost, lane) > 0 then claim(lane, 'read', 1); pay('read', read_cost) end
    elseif head.path == 'write' then
      in_one_call('write'); pay('write', cancel_cost)
    else
      -- A call for many is worth more than one for one, as long as nothing that needs it goes short.
      local unscoped = affordable('write', cancel_cost, lane)
      local many = #shards > 1 or redis.call('ZCOUNT', prefix .. ':due:' .. lane .. ':' .. head.path, '-inf', now_ms) > 1
      if many and at_most > 1 and unscoped > 1 and (unscoped >= at_most or not unscoped_wanted) then
        in_one_call(nil); pay('write', cancel_cost)
      elseif affordable(head.path, cancel_cost, lane) > 0 then
        claim(lane, head.path, 1); pay(head.path, cancel_cost)
      end
    end
    if #claimed > 0 then return end
  end
end

for at = 8, #ARGV, 2 do
  local lane = ARGV[at]
  if #claimed == 0 then
    take_from(lane)
    redis.call('SET', prefix .. ':claimed_ms:' .. lane, now_ms, 'PX', 60000)
  end
  waiting = waiting + redis.call('LLEN', ARGV[at + 1])
end
local next_due_ms = 0
for at = 8, #ARGV, 2 do
  for _, path in ipairs(paths) do
    local first = redis.call('ZRANGE', prefix .. ':due:' .. ARGV[at] .. ':' .. path, 0, 0, 'WITHSCORES')
    if first[2] and (next_due_ms == 0 or tonumber(first[2]) < next_due_ms) then next_due_ms = tonumber(first[2]) end
  end
end
return { now_ms, waiting, next_due_ms, #claimed == 0 and held_up_ms or 0, paid_bucket, tostring(paid), claimed }
