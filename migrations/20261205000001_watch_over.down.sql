drop table audit_heads;
drop table audit;
delete from budgets where scope = 'directive';
alter table budgets drop constraint budgets_scope_check;
alter table budgets add constraint budgets_scope_check check (scope in ('company', 'agent', 'playbook', 'run', 'step'));
alter table tasks drop column root_id;
alter table agents drop column beat_digest, drop column beat_repeats;
drop table provider_gates;
