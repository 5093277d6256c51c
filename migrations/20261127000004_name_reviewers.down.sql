alter table approvals drop column escalated_at;
alter table approvals drop column reviewers;
