"""The token account of one group: who holds how much of the KV cache.

Every resident sequence is an account: charged for the pages it has reserved, less those that it
shares with its parent. So shared tokens are counted once, for as long as anyone holds them:

    A, reserved 24   |########################|    charged 24
    B, share_len 12  |............##########|      shares 12 of A, charged 10
    A is dropped     |######################|      B now owns the first 12 too, charged 22

Behind the transfer are two facts. A child shares more than its parent does, for otherwise it would
be a child of its grandparent; and no more than its parent has reserved. So what the heirs take over
is never more than what the dropped one gives back.
"""

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Account:
    """What one sequence holds, in tokens. ``share_len`` is a whole number of pages."""

    holder: int
    reserved: int
    parent: "Account | None" = None
    share_len: int = 0
    children: "list[Account]" = field(default_factory=list)


class Ledger:
    """Opens, extends and closes accounts; the sum of their charges is ``charged``."""

    def __init__(self, capacity: int, page: int) -> None:
        assert capacity >= 0 < page
        self.capacity = capacity - capacity % page
        self.page = page
        self.charged = 0

    @property
    def free(self) -> int:
        """Tokens that nobody holds."""
        return self.capacity - self.charged

    def pages(self, tokens: int) -> int:
        """Tokens rounded up to whole pages."""
        return -(-tokens // self.page) * self.page

    def whole_pages(self, tokens: int) -> int:
        """Tokens rounded down to whole pages."""
        return tokens - tokens % self.page

    def charge_of(self, account: Account) -> int:
        """What this account is charged."""
        return self.pages(account.reserved) - account.share_len

    def open(
        self, holder: int, reserved: int, parent: Account | None = None, share_len: int = 0
    ) -> Account:
        """Opens an account that shares the first ``share_len`` tokens of its parent."""
        while parent is not None and share_len <= parent.share_len:
            parent = parent.parent
        assert share_len % self.page == 0
        assert parent is not None or share_len == 0
        account = Account(holder, reserved, parent, share_len)
        if parent is not None:
            assert share_len <= self.pages(parent.reserved)
            parent.children.append(account)
        self._add(self.charge_of(account))
        return account

    def resize(self, account: Account, reserved: int) -> None:
        """Changes what the account has reserved; never below what its children share."""
        before = self.charge_of(account)
        account.reserved = reserved
        assert all(child.share_len <= self.pages(reserved) for child in account.children)
        self._add(self.charge_of(account) - before)

    def close(self, account: Account) -> None:
        """Closes an account; the child that shares most of it becomes the owner of that."""
        self._add(-self.charge_of(account))
        if account.parent is not None:
            account.parent.children.remove(account)
        if account.children:
            self._inherit(account, max(account.children, key=lambda child: child.share_len))

    def freed_by(self, closing: list[Account], staying: list[Account]) -> int:
        """Tokens that would be free if the former were all closed, and the latter stayed.

        That is their charges, less what those who stay would inherit, directly or through others.
        """
        held = {account.holder: account.share_len for account in closing}
        for child in staying:
            while (parent := child.parent) is not None and parent.holder in held:
                reached = held[parent.holder] > parent.share_len
                held[parent.holder] = max(held[parent.holder], child.share_len)
                if reached:
                    break
                child = parent
        return sum(self.pages(account.reserved) - held[account.holder] for account in closing)

    def _inherit(self, former: Account, heir: Account) -> None:
        """The heir takes the former owner's place under its parent, its siblings move under it."""
        self._add(heir.share_len - former.share_len)
        for sibling in former.children:
            if sibling is not heir:
                sibling.parent = heir
                heir.children.append(sibling)
        heir.parent, heir.share_len = former.parent, former.share_len
        if heir.parent is not None:
            heir.parent.children.append(heir)

    def _add(self, tokens: int) -> None:
        self.charged += tokens
        assert 0 <= self.charged <= self.capacity, "the ledger is out of balance"
