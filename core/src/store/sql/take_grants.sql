-- Looks keys up, and lets an API process take from the limits of their accounts
-- what it will hand out next, or give back and charge what it has: one
-- statement under the account's row lock, whatever the number of processes.
--
-- All that is compared stands in the row that is locked, so that whoever waits
-- for the lock decides by what the one before has left.
with d as materialized (
    select d.*, k.id as key_id, k.company_id, k.live, k.scopes, coalesce(k.account_id, d.known) as account_id
    from unnest($2::uuid[], $3::bytea[], $4::integer[], $5::integer[], $6::integer[], $7::integer[], $8::bigint[])
        with ordinality as d (known, hash, want, back, held, slots, spent, place)
    left join api_keys k on k.hash = d.hash and k.revoked_at is null
),
a as materialized (
    select a.* from accounts a where a.id = any (array(select account_id from d)) order by a.id for update
),
g as materialized (
    select d.place, a.id, d.spent, l.rate, l.most, b.minute - n.granted as minute, b.second - n.granted as second, n.granted,
        s.kept, c.now,
        -- Who does not know the account yet does not know what its process holds.
        greatest(d.held, least(d.slots, l.most - s.others), case when d.known is null then s.mine end)::integer as slots,
        a.credits - d.spent as credits
    from d
    join a on a.id = d.account_id
    join tiers t on t.name = a.tier
    cross join lateral (
        select coalesce(a.rate_per_minute, t.rate_per_minute) as rate,
            coalesce(a.burst_per_second, t.burst_per_second) as burst,
            coalesce(a.concurrent, t.concurrent) as most
    ) l
    cross join lateral (
        select extract(epoch from clock_timestamp())::double precision as now,
            greatest(0, extract(epoch from clock_timestamp() - a.metered_at))::double precision as elapsed
    ) c
    cross join lateral (
        select least(l.rate, a.minute_tokens + d.back + c.elapsed * l.rate / 60) as minute,
            least(l.burst, a.second_tokens + d.back + c.elapsed * l.burst) as second
    ) b
    cross join lateral (select greatest(0, least(d.want, floor(b.minute), floor(b.second)))::integer as granted) n
    -- Slots of a process that is gone are free again.
    cross join lateral (
        select coalesce(sum((e.value ->> 0)::integer) filter (where e.key <> $1), 0)::integer as others,
            sum((e.value ->> 0)::integer) filter (where e.key = $1) as mine,
            coalesce(jsonb_object_agg(e.key, e.value) filter (where e.key <> $1), '{}') as kept
        from jsonb_each(a.slots) e
        where (e.value ->> 1)::double precision > c.now
    ) s
),
u as (
    update accounts a
    set credits = a.credits - g.spent,
        minute_tokens = g.minute,
        second_tokens = g.second,
        metered_at = to_timestamp(g.now),
        slots = case
            when g.slots > 0 then g.kept || jsonb_build_object($1::text, jsonb_build_array(g.slots, g.now + $9::double precision))
            else g.kept
        end
    from g
    where a.id = g.id
)
select d.place as "place!", d.key_id as "key_id?", d.company_id, d.live as "live?", d.scopes as "scopes?", d.account_id as "account_id?",
    g.granted as "granted?", g.slots as "slots?", g.rate as "rate?", g.most as "most?", g.minute as "minute?", g.credits as "credits?"
from d
left join g on g.place = d.place
