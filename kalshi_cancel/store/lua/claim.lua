-- claim: executes the planner's steps in turn, each of which is one call, and shows what they have left; put before turn.lua.
--
-- Expects `prefix`, `now_ms`, gather.lua, wake_ups.lua, buckets.lua, lines.lua and steps.lua. wanted: steps (see steps.lua) · lanes (the
--       most urgent first) · queues (the lanes') · calls (how many, if they are for one order each) · reads (how many of the
--       calls may read) · lease_ms · exchange_ms (this moment on the exchange's clock; empty: not known) · worker (its name) ·
--       offer (as grant.lua has it, if it may be idle) · idle_ms (how long that counts)
-- returns { this moment (ms), senders that are coming (woken, or messages in the queues), whether more could be claimed now (1, 0),
--           wait for tokens (ms, 0: none is held up), lines, buckets (see lines.lua), for each call { bucket, tokens paid, a list
--           of { order_id, token, request, progress, sent, first_sent_ms, lane, accepted_ms, deadline_ms, reported,
--                first_sent_age (ms since accepted_ms) } } };
--         a first call without a bucket: of entries that are none (the key holds something else), the order ids
--
-- worker/dispatch/planner.py has planned, by what the last turn had left. A call for several is the last one. If there is more, another is woken.

local LAST_TOKEN_MOST = 2 ^ 52  -- beyond that, Lua's numbers are not all different

local function last_token()
  local last = number(redis.call('GET', prefix .. ':fence') or 0)
  if not last or last % 1 ~= 0 or math.abs(last) > LAST_TOKEN_MOST then error({ err = 'ERR the last fencing token is no number' }) end
  return last
end

local function execute_all(wanted)  -- the calls, and which lanes were looked at
  local calls, looked, token = {}, {}, last_token()
  local first, most, reads = token, wanted.calls, wanted.reads
  for _, step in ipairs(wanted.steps) do
    for _ = 1, #calls < most and step.times or 0 do
      looked[step.lane] = true
      local call = #calls < most and (not step.reads or reads > 0) and execute(step, token, wanted)
      if not call then break end
      calls[#calls + 1] = call
      token = token + #call[3]
      if step.reads then reads = reads - 1 end
      if #call[3] > 1 then most = 0 end
    end
  end
  if token > first then write('INCRBY', prefix .. ':fence', token - first) end
  return calls, looked, reads
end

local function look_again(wanted, reads, due)  -- by lane, whether a step could be executed now; else how long for tokens (ms)
  local more, held_up_ms = {}, 0
  for _, step in ipairs(wanted.steps) do
    local waiting = 0
    for _, path in ipairs(step.paths) do waiting = waiting + (due[line(step.lane, path)] or 0) end
    if waiting >= step.least and (not step.reads or reads > 0) then
      local wait = wait_ms(state(step.bucket), step.cost, reserve(step))
      if paid_for(step) > 0 then more[step.lane] = true elseif wait > 0 and (held_up_ms == 0 or wait < held_up_ms) then held_up_ms = wait end
    end
  end
  return more, held_up_ms
end

local function say_idle(wanted, is_idle)  -- whoever has found nothing is idle; who has work, or sees some that waits, is not
  local key, offer = prefix .. ':idle', wanted.offer
  if is_idle and offer then
    offer.until_ms = now_ms + wanted.idle_ms
    afterwards[#afterwards + 1] = { 'HSET', key, wanted.worker, cjson.encode(offer) }
  elseif not is_idle and redis.pcall('HEXISTS', key, wanted.worker) == 1 then
    afterwards[#afterwards + 1] = { 'HDEL', key, wanted.worker }
  end
end

local function claim(wanted)
  local calls, looked, reads = execute_all(wanted)
  local lines, levels = snapshot(wanted.lanes, redis.call('SMEMBERS', prefix .. ':paths'))
  local due, all_due, coming, is_more = {}, 0, 0, 0
  for _, each in ipairs(lines) do due[line(each[1], each[2])], all_due = each[4], all_due + each[4] end
  local more, held_up_ms = look_again(wanted, reads, due)
  for lane in pairs(looked) do gather('HSET', prefix .. ':claimed_ms', lane, now_ms) end
  say_idle(wanted, #calls == 0 and all_due == 0)
  flush()
  for at, lane in ipairs(wanted.lanes) do
    coming = coming + length(wanted.queues[at])
    if #calls > 0 and more[lane] then is_more, coming = 1, coming + wake_up(lane) end
  end
  if #spoilt > 0 then table.insert(calls, 1, { '', '0', spoilt }) end
  return { now_ms, coming, is_more, held_up_ms, lines, levels, unpack(calls) }
end
