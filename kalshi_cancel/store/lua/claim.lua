-- claim: takes tokens and, for the time of a lease, what they pay for: one call's worth of due entries, or several
-- calls of one entry each.
--
-- Expects `prefix`, `now_ms`, buckets.lua, wake_ups.lua and gather.lua; put before turn.lua. wanted: at_most (orders in
--       one call) · calls (how many, if they are for one order each) · lease_ms · exchange_ms (this moment on the
--       exchange's clock; empty: not known) · risk_share (of a write bucket, kept for risk) · cancel_cost ·
--       read_cost · list_cost · worker (its name) · reads (how many of the calls may be read-backs) · reads_after_ms
--       (how much later than it is a read-back counts as due) · idle_ms (how long an offer counts) · offer (as grant.lua has
--       it; absent: it is not idle) · lanes (the most urgent first: { lane, its queue })
-- returns { this moment (ms), senders that are coming (woken, or messages in the queues), whether more could be
--           claimed now (1, 0), when the next entry is due (ms, 0: none), wait for tokens (ms, 0: none is held up),
--           for each call { bucket paid from, tokens paid,
--             a list of { order_id, token, request, progress, sent, first_sent_ms, lane, accepted_ms,
--                         deadline_ms, reported, first_sent_age (ms since accepted_ms) } } };
--         a first one without a bucket: of entries that are none (the key holds something else), the order ids
--
-- The lanes in turn, and within a lane the path whose head has waited longest, but for a head start: what was
-- never sent goes before what is to be read back. A read-back leaves the tokens of a listing. Paths:
-- `read` one read-back; `reads` many that one listing may answer, or one if that is cheaper; `write` as many
-- cancels as the unscoped bucket pays for, in one call, filled up from the shards' paths; `write:N` one cancel
-- of a shard from its own bucket, the fullest first, or many from what the unscoped bucket can spare. To the shards
-- that one lends where it refills as fast as single calls are made, and where they have no tokens.
-- An entry whose lease ran out is due like any other. `sent` is what it was before this claim, so 1 means that
-- a claimer vanished and an answer may be lost; a claim that is to read back leaves it as it was. The token fences: only the latest claim's token settles,
-- extends or ends it. When more could be claimed, another sender is woken.

local READS_AT_ONCE = 200  -- what is put down in one step, too
local WORTH_A_CALL = 20  -- orders
local SINGLE_CALL_MS = 3  -- of a sender's time; a bucket that takes longer to refill is kept for what only it pays for
local SPOILT_MS = 60000  -- until what is no entry is met again, should nobody have set it aside
local LAST_TOKEN_MOST = 2 ^ 52  -- beyond that, Lua's numbers are not all different
local HEAD_START_MS = 100  -- of what goes out many at a time, before singles that came with it

local function claim(wanted)
  local at_most, most_calls, lease_ms, share = wanted.at_most, wanted.calls, wanted.lease_ms, wanted.risk_share
  local cancel_cost, read_cost, list_cost = wanted.cancel_cost, wanted.read_cost, wanted.list_cost
  local reads_most = wanted.reads
  local calls, held_up_ms = {}, 0
  local claimed, taken, paid_bucket, paid  -- of the call that is being put together
  local gone, spoilt, given = {}, {}, 0  -- how many of each line's head are taken by now; what is no entry; tokens given
  local last_token = number(redis.call('GET', prefix .. ':fence') or 0)
  if not last_token or last_token % 1 ~= 0 or math.abs(last_token) > LAST_TOKEN_MOST then
    error({ err = 'ERR the last fencing token is no number' })
  end
  local paths, states, due_at = redis.call('SMEMBERS', prefix .. ':paths'), {}, {}

  local function state(name)
    states[name] = states[name] or bucket_state(name)
    return states[name]
  end

  local function is_read(path) return path ~= 'write' and string.sub(path, 1, 6) ~= 'write:' end

  local function may_take(path) return not is_read(path) or reads_most > 0 end

  local function affordable(name, cost, lane)
    local bucket = state(name)
    local reserve = lane == 'strategy' and share * bucket.capacity or 0
    if name == 'read' then reserve = math.min(list_cost, (bucket.capacity - cost) / 2) end
    local orders = math.floor((bucket.tokens - reserve) / cost)
    if orders < 1 then
      local wait = wait_ms(bucket, cost, reserve)
      if held_up_ms == 0 or wait < held_up_ms then held_up_ms = wait end
      return 0
    end
    return orders
  end

  local function look(lane, path)  -- when the head of a path is due; false: it is empty
    local due = prefix .. ':due:' .. lane .. ':' .. path
    if due_at[due] == nil then
      local first = gone[due] or 0
      local head = redis.call('ZRANGE', due, first, first, 'WITHSCORES')
      due_at[due] = head[2] and tonumber(head[2]) or false
    end
    return due_at[due]
  end

  local function waiting(lane, path)  -- how many are due
    local due = prefix .. ':due:' .. lane .. ':' .. path
    return redis.call('ZCOUNT', due, '-inf', now_ms) - (gone[due] or 0)
  end

  local function is_shard(path) return string.sub(path, 1, 6) == 'write:' end

  local function spare(lane)  -- how many of the shards' orders one call from the unscoped bucket may be for, and are there
    local most = math.min(affordable('write', cancel_cost, lane), at_most)
    if most < 2 then return 0, 0 end
    local there = 0
    for _, path in ipairs(paths) do
      if is_shard(path) then there = there + waiting(lane, path) end
    end
    return math.min(most, there, affordable('write', cancel_cost, lane) - waiting(lane, 'write')), there
  end

  local function take(lane, path, count)
    local due = prefix .. ':due:' .. lane .. ':' .. path
    due_at[due] = nil  -- as of now
    local ids = redis.call('ZRANGE', due, '-inf', now_ms, 'BYSCORE', 'LIMIT', gone[due] or 0, count)
    gone[due] = (gone[due] or 0) + #ids
    for _, order_id in ipairs(ids) do
      local entry = prefix .. ':pending:' .. order_id
      local e = fields(entry, 'request', 'progress', 'sent', 'first_sent_ms', 'lane',
        'accepted_ms', 'deadline_ms', 'reported', 'first_sent_age')
      if not e then
        spoilt[#spoilt + 1] = { order_id }
        gather('ZADD', due, now_ms + SPOILT_MS, order_id)
      elseif e[1] or e[5] or e[6] then
        taken[#taken + 1] = { entry, due, e[4] }
        claimed[#claimed + 1] = { order_id, 0, e[1] or '', e[2] or '', e[3] or '', e[4] or '', e[5] or '', e[6] or '',
          e[7] or '', e[8] or '', e[9] or '' }
      else
        gather('ZREM', due, order_id)  -- an index without its entry: somebody deleted keys by hand
      end
    end
  end

  local function mark()  -- what was taken is this sender's now
    local token = last_token + given
    for at, each in ipairs(taken) do
      local entry, due = each[1], each[2]
      if paid_bucket == 'read' then  -- nothing is sent before it is claimed anew from its write path
        write('HSET', entry, 'token', token + at, 'claimed_by', wanted.worker)
      elseif each[3] then
        write('HSET', entry, 'token', token + at, 'claimed_by', wanted.worker, 'sent', 1)
      else
        write('HSET', entry, 'token', token + at, 'claimed_by', wanted.worker, 'sent', 1, 'first_sent_ms', wanted.exchange_ms,
          'first_sent_age', now_ms - (tonumber(claimed[at][8]) or now_ms))
      end
      gather('ZADD', due, now_ms + lease_ms, claimed[at][1])
      claimed[at][2] = token + at
    end
    given = given + #taken
  end

  local function pay(name, cost)
    paid_bucket, paid = name, cost * #claimed
    if paid > 0 then
      spend(states[name], paid)
    end
  end

  local function take_from(lane)
    local heads, shards = {}, {}
    for _, path in ipairs(paths) do
      local at = look(lane, path)
      if at and at <= now_ms and may_take(path) then
        if path == 'write' then at = at - HEAD_START_MS end
        if is_read(path) then at = at + wanted.reads_after_ms end
        heads[#heads + 1] = { path = path, at = at }
      end
    end
    table.sort(heads, function(a, b) return a.at < b.at end)
    for _, head in ipairs(heads) do
      if is_shard(head.path) then shards[#shards + 1] = head.path end
    end
    -- Of the shards' buckets the one that holds the most: what a full one refills is lost.
    table.sort(shards, function(a, b) return state(a).tokens > state(b).tokens end)
    local lacking = shards[1] and affordable(shards[1], cancel_cost, lane) == 0
    local lends = lacking or state('write').refill * SINGLE_CALL_MS >= cancel_cost * 1000
    local function in_one_call(path, at_most)  -- a batch from the unscoped bucket, of this path and then the shards'
      local orders = math.min(at_most, affordable('write', cancel_cost, lane))
      if path and orders > 0 then take(lane, path, orders) end
      for at = lends and #shards or 0, 1, -1 do
        if #claimed < orders then take(lane, shards[at], orders - #claimed) end
      end
      pay('write', cancel_cost)
    end
    for _, head in ipairs(heads) do
      if head.path == 'reads' then
        local many = waiting(lane, 'reads') * read_cost > list_cost
        local cost = many and list_cost or read_cost
        if affordable('read', cost, lane) > 0 then
          take(lane, 'reads', many and READS_AT_ONCE or 1)
          pay('read', cost / #claimed)
        end
      elseif head.path == 'write' then
        in_one_call('write', at_most)
      elseif not is_shard(head.path) then  -- `read`, and where a newer version than this one left off
        if affordable('read', read_cost, lane) > 0 then take(lane, head.path, 1); pay('read', read_cost) end
      else
        -- A call costs as much as ten orders: for few, singles are as good and leave the unscoped bucket to fill up.
        local many, there = spare(lane)
        if many > 1 and lends and (lacking or many >= math.min(there, WORTH_A_CALL)) then
          in_one_call(nil, many)
        elseif not lacking then
          take(lane, shards[1], 1); pay(shards[1], cancel_cost)
        end
      end
      if #claimed > 0 then
        if is_read(head.path) then reads_most = reads_most - 1 end
        return
      end
    end
  end

  local function more(lane)  -- whether something is due that could be paid for
    for _, path in ipairs(paths) do
      local at = look(lane, path)
      if at and at <= now_ms and may_take(path) then
        local reading = is_read(path)
        if affordable(reading and 'read' or path, reading and read_cost or cancel_cost, lane) > 0 then return true end
        if is_shard(path) and spare(lane) > 1 then return true end
      end
    end
    return false
  end

  local looked, with_more, coming, next_due_ms, is_more = {}, {}, 0, 0, false
  for _, each in ipairs(wanted.lanes) do
    local lane, queue = unpack(each)
    if #calls < most_calls then
      repeat
        claimed, taken, paid_bucket, paid = {}, {}, '', 0
        take_from(lane)
        if #claimed == 0 then break end
        mark()
        calls[#calls + 1] = { paid_bucket, tostring(paid), claimed }
        if #claimed > 1 then most_calls = 0 end  -- a call for many has its turn to itself
      until #calls >= most_calls
      looked[#looked + 1] = lane
      looked[#looked + 1] = now_ms
    end
    coming = coming + length(queue)
    for _, path in ipairs(paths) do
      local due = may_take(path) and look(lane, path)  -- whoever reads back now looks for more of that by itself
      if due and (next_due_ms == 0 or due < next_due_ms) then next_due_ms = due end
    end
    if #calls > 0 and more(lane) then
      is_more = true
      with_more[#with_more + 1] = lane
    end
  end
  if #calls > 0 and (next_due_ms == 0 or next_due_ms > now_ms + lease_ms) then next_due_ms = now_ms + lease_ms end
  if given > 0 then write('INCRBY', prefix .. ':fence', given) end
  write('HSET', prefix .. ':claimed_ms', unpack(looked))
  -- Whoever has found nothing is idle; who has work, or waits for tokens, is not.
  local idle, offer, has_none = prefix .. ':idle', wanted.offer, #calls == 0 and held_up_ms == 0
  if has_none and offer then
    offer.until_ms = now_ms + wanted.idle_ms
    afterwards[#afterwards + 1] = { 'HSET', idle, wanted.worker, cjson.encode(offer) }
  elseif not has_none and redis.pcall('HEXISTS', idle, wanted.worker) == 1 then
    afterwards[#afterwards + 1] = { 'HDEL', idle, wanted.worker }
  end
  flush()
  for _, lane in ipairs(with_more) do coming = coming + wake_up(lane) end
  if #spoilt > 0 then table.insert(calls, 1, { '', '0', spoilt }) end
  return { now_ms, coming, is_more and 1 or 0, next_due_ms, held_up_ms, unpack(calls) }
end
