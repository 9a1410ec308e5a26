-- steps: executes one step of the planner's, as far as it is due and paid for; put before claim.lua.
--
-- Expects `prefix`, `now_ms`, gather.lua, buckets.lua and lines.lua. A step: lane · paths (to take from, in turn) · most (orders) ·
--       bucket (that pays) · cost (of an order, or `together`: of all) · keep, share (tokens, and part of the capacity, that
--       stay in it) · reads (whether it is a read-back) · least (orders that must be due) · behind (a path: what is due
--       there keeps its tokens) · times (how many calls it may be)
--
-- An entry whose lease ran out is due like any other. `sent` is what it was before this claim: 1 means that a claimer vanished and an
-- answer may be lost. A claim that is to read back leaves it as it was. The token fences: only the latest claim's token settles,
-- extends or ends it.

local SPOILT_MS = 60000  -- until what is no entry is met again, should nobody have set it aside
local spoilt = {}  -- what is no entry

local function reserve(step) return step.keep + step.share * state(step.bucket).capacity end

local function paid_for(step)  -- how many orders there are tokens for
  local orders = math.floor((state(step.bucket).tokens - reserve(step)) / step.cost)
  if step.behind ~= '' then orders = orders - number_due(line(step.lane, step.behind)) end
  return step.together and orders >= 1 and step.most or math.min(orders, step.most)
end

local function take(due, count, claimed)  -- adds so many of a line to what is claimed; { fields of an entry .., key, line }
  local ids = count > 0 and redis.call('ZRANGE', due, '-inf', now_ms, 'BYSCORE', 'LIMIT', gone[due] or 0, count) or {}
  gone[due] = (gone[due] or 0) + #ids
  for _, order_id in ipairs(ids) do
    local key = prefix .. ':pending:' .. order_id
    local e = fields(key, 'request', 'progress', 'sent', 'first_sent_ms', 'lane', 'accepted_ms', 'deadline_ms', 'reported', 'first_sent_age')
    if not e then
      spoilt[#spoilt + 1] = { order_id }
      gather('ZADD', due, now_ms + SPOILT_MS, order_id)
    elseif e[1] or e[5] or e[6] then
      claimed[#claimed + 1] = { order_id, 0, e[1] or '', e[2] or '', e[3] or '', e[4] or '', e[5] or '', e[6] or '',
        e[7] or '', e[8] or '', e[9] or '', key = key, due = due, was_sent = e[4] }
    else
      gather('ZREM', due, order_id)  -- an index without its entry: somebody deleted keys by hand
    end
  end
end

local function mark(claimed, token, step, wanted)  -- what was taken is this sender's now
  for at, entry in ipairs(claimed) do
    entry[2] = token + at
    if step.bucket == 'read' then  -- nothing is sent before it is claimed anew from its write path
      write('HSET', entry.key, 'token', token + at, 'claimed_by', wanted.worker)
    elseif entry.was_sent then
      write('HSET', entry.key, 'token', token + at, 'claimed_by', wanted.worker, 'sent', 1)
    else
      write('HSET', entry.key, 'token', token + at, 'claimed_by', wanted.worker, 'sent', 1, 'first_sent_ms', wanted.exchange_ms,
        'first_sent_age', now_ms - (tonumber(entry[8]) or now_ms))
    end
    gather('ZADD', entry.due, now_ms + wanted.lease_ms, entry[1])
  end
end

local function execute(step, token, wanted)  -- a call; nil: too little is due there, or paid for
  local orders, claimed = paid_for(step), {}
  if step.least > 1 and number_due(line(step.lane, step.paths[1])) < step.least then return nil end
  for _, path in ipairs(step.paths) do take(line(step.lane, path), orders - #claimed, claimed) end
  if #claimed == 0 then return nil end
  local cost = step.together and step.cost or step.cost * #claimed
  spend(state(step.bucket), cost)
  mark(claimed, token, step, wanted)
  return { step.bucket, tostring(cost), claimed }
end
