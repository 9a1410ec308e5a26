-- grant: claims a lone new cancel for an idle worker, in the step that accepts it; put before accept.lua.
--
-- Expects `prefix`, `now_ms`, gather.lua, wake_ups.lua and buckets.lua. P:idle has the idle workers (claim.lua puts them there), each with
-- what it offers (JSON): until_ms · lanes (that it serves) · lease_ms · cost (of a cancel) · risk_share (of a bucket) · exchange_ms (this
-- moment on the exchange's clock: its bounds, or empty).
--
-- The wake-up then carries the claim, as turn.lua would have answered it, and its first reader sends the cancel. Where nobody is idle,
-- where the tokens are not there, or where the user may not do all this, the entry is due, and whoever is woken claims it.

local BY_WAKE_UP = '(whoever took the wake-up)'  -- until its lease is extended for the first time

local function is_offer(found)
  if type(found) ~= 'table' or type(found.lanes) ~= 'table' or type(found.exchange_ms) ~= 'string' then return false end
  for _, name in ipairs({ 'until_ms', 'lease_ms', 'cost', 'risk_share' }) do
    if type(found[name]) ~= 'number' then return false end
  end
  return true
end

local function offer(in_lane)  -- of an idle worker: its name and its values; nil: nobody is idle
  local idle = redis.pcall('HGETALL', prefix .. ':idle')
  for at = 1, #idle, 2 do
    local is_json, offered = pcall(cjson.decode, idle[at + 1])
    if is_json and is_offer(offered) and offered.until_ms >= now_ms and offered.lanes[in_lane] then
      offered.worker = idle[at]
      return offered
    end
  end
end

local function payable(name, cost, share)  -- the bucket, if these tokens are there and may be taken; else nil
  local key = prefix .. ':bucket:' .. name
  if not redis.acl_check_cmd('HSET', key, '', '') or redis.pcall('HMGET', key, 'tokens').err then return nil end
  local is_read, bucket = pcall(bucket_state, name)
  return is_read and wait_ms(bucket, cost, share * bucket.capacity) == 0 and bucket or nil
end

local function is_awaited(list, in_lane)  -- whether a listening sender would take a wake-up at once
  sure[list] = redis.pcall('LLEN', list) == 0
  return sure[list] and redis.pcall('EXISTS', prefix .. ':listeners:' .. in_lane) == 1
    and redis.acl_check_cmd('LPUSH', list, '') and redis.acl_check_cmd('HDEL', prefix .. ':idle', '')
end

local function grant(in_lane, path)  -- takes the tokens for one cancel; the claim, nil: there is none
  local taken, list = offer(in_lane), prefix .. ':wake_up:' .. in_lane
  if not taken or not is_awaited(list, in_lane) then return nil end
  local bucket = payable(path, taken.cost, in_lane == 'strategy' and taken.risk_share or 0)
  if not bucket then return nil end
  spend(bucket, taken.cost)
  write('HDEL', prefix .. ':idle', taken.worker)
  -- No two claims of one entry are made in the same microsecond; the fence is left to workers.
  taken.list, taken.path, taken.token = list, path, 'g' .. string.format('%.0f', now_us)
  return taken
end

local function pass_on(claim, order_id, request, in_lane, deadline_ms)  -- the claimed entry, to whoever takes the wake-up
  local at_ms = string.format('%.0f', now_ms)
  gather('HSET', prefix .. ':pending:' .. order_id, 'token', claim.token, 'claimed_by', BY_WAKE_UP, 'sent', 1,
    'first_sent_ms', claim.exchange_ms, 'first_sent_age', 0)
  local entry = { order_id, claim.token, request, '', '', '', in_lane, at_ms, string.format('%.0f', deadline_ms), '', '' }
  write('LPUSH', claim.list, cjson.encode({ at_ms, { claim.path, tostring(claim.cost), { entry } } }))
end
