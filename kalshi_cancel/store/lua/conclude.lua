-- conclude: ends claims: settled, retry later, or dead letter; put before turn.lua.
--
-- Expects gather.lua and reply.lua. asked: record_prefix · life_s; rows: order_id · token · "settled", "dead", or the pause before it is due again, ms ·
--       its path from now on (empty: as it was) · the progress (JSON) · the record up to · and after its
--       requested_by (only when settled)
-- returns for each entry: 1 done, 0 the claim was no longer this sender's and nothing was touched; and those ids
--
-- Settled: the record is stored and the entry goes, in this one step. Given back without a pause, an entry
-- has its old place in the line. Dead: it is kept, with its progress, until somebody asks again.
-- The record ends in `"task_id":` so that the same text serves every task that wants the result; who
-- requested it is filled in here, because further requests may have joined since the claim.

local function conclude()
  local answer, lost = {}, {}
  for order_id, token, conclusion, path, progress, head, tail in rows(7) do
    local entry = prefix .. ':pending:' .. order_id
    local held = fields(entry, 'token', 'lane', 'requested_by', 'reply_to', 'accepted_ms', 'path', 'asked_again', 'left_out', 'waiters') or {}
    local due = prefix .. ':due:' .. (held[2] or '') .. ':' .. (held[6] or '')
    if held[1] ~= token then
      lost[#lost + 1] = order_id
      answer[#answer + 1] = 0
    elseif conclusion == 'settled' then
      local replied = store_and_reply(asked.record_prefix, asked.life_s, order_id, head, held[3], tail, held[4], held[8], held[9])
      if replied and replied > 0 then write('ZREMRANGEBYRANK', prefix .. ':waiters:' .. order_id, 0, replied - 1) end
      gather('ZREM', due, order_id)
      gather('ZREM', prefix .. ':deadline', order_id)
      delete(entry)
      answer[#answer + 1] = 1
    else
      write('HSET', entry, 'progress', progress, 'token', '', 'sent', 0)
      write('HDEL', entry, 'first_sent_ms', 'first_sent_age')  -- the progress covers this sender's attempts
      if conclusion == 'dead' and held[7] then conclusion = '0' end  -- asked for again meanwhile: somebody waits for it anew
      if conclusion == 'dead' then
        gather('ZREM', due, order_id)
        gather('ZREM', prefix .. ':deadline', order_id)
        gather('ZADD', prefix .. ':dead', now_ms, order_id)
        write('RENAME', entry, prefix .. ':dead:' .. order_id)
      else
        if held[7] then  -- asked for again meanwhile: the long pause of an overdue one is not meant any more
          conclusion = math.min(tonumber(conclusion), 1000)
          gather('HDEL', entry, 'asked_again')
        end
        if path ~= '' and path ~= held[6] then
          write('HSET', entry, 'path', path)
          gather('SADD', prefix .. ':paths', path)
          gather('ZREM', due, order_id)
          due = prefix .. ':due:' .. (held[2] or '') .. ':' .. path
        end
        gather('ZADD', due, tonumber(conclusion) == 0 and number(held[5]) or now_ms + conclusion, order_id)
      end
      answer[#answer + 1] = 1
    end
  end
  flush()
  return answer, lost
end
