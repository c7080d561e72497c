"""Pairs of a solution's answer and answers to it, by kind: what the answer check must pay and what it must refuse.

Each line is `solution | answer | answer ...`. In the kind "solutions" the first part is a whole solution.
"""

RIGHT = {
    "marks": r"""
        73 | *73* | ***73*** | __73__
        B | __B__
        12 | **12 cm** | `12` | ``` 12 ```
        x = 4 | **x = 4**
        D | **D.** | **Option D** | **D**: because the sum is 180
        7/8 | **Answer:** 7/8 | **Final Answer**: $\frac{7}{8}$
        No | **No**
        42 | ### 42 | “42” | "42" | <b>42</b> | 42**
        C | ‘C’
    """,
    "lead-ins": r"""
        42 | The final answer is: 42 | The final answer is $42$. | Final answer: 42 | FINAL ANSWER: 42.
        42 | Answer = 42 | The answer is therefore 42 | So the answer is 42.
        42 | Therefore, the answer is $\boxed{42}$. | Thus, 42 | Hence 42 | We get 42 | It is 42. | = 42 | : 42
        42 | The answer is 42. I hope it is correct. | The result is 42 | The solution is x = 42
        42 | ### The final answer is: 42 | 答案：42
        C | The correct answer is C | The correct option is (C). | The correct choice is C.
        C | The answer is option C. | So the correct answer is: (C) 12 | C is correct. | C is the correct answer
        C | Option C is correct | The answer is (C), because the angles are equal. | I choose C | 答案是C | 故选C
        C | 正确答案：C。 | 所以答案为 C | 选C
        blue | The answer is blue.
        The answer is 7 | 7
        Answer: D | D
        Therefore the sum is 15. | 15
        The area of the triangle is 24 cm². | 24 | 24 cm^2
        24 | The area of the triangle is 24 square centimeters. | The shaded area equals 24 | Area: 24
        24 | There are 24 of them | There are 24 students | Tom has 24 marbles
        60 | Angle ABC is 60° | $\angle ABC = 60^\circ$ | m∠ABC = 60
        the cat | Cat
        No solution | There is no solution.
    """,
    "choices": r"""
        B | B | B. | B) | (B) | [B] | b | (b) | b) | B: | Ｂ | （B） | B、12 | B: 12 cm | B. 12 cm | B) 12 cm | B.12cm
        B | B – 12 cm | B (12 cm) | B 12 | (B) the red one | (B): The Red One | B. The red one | Option B | option b
        B | Option B: 12 | choice B | Choice (B) | \boxed{\text{B}} | $\mathbf{B}$ | $\textbf{(B)}$
        B | \textbf{(B) } 12 | \(\boxed{B}\) | \mathrm{B} | B, since 3 + 4 = 7 | B because the sides are equal
        (B) | B
        (B) 12 cm | B | 12 cm | 12
        B. red | red | Red.
        B: 45° | B: 45 | 45°
        B. $\frac{1}{2}$ | 0.5
        \text{(B)} | B
        D. None of the above | D
        D. Both A and B | D | Both A and B
        D | D. None of the above | D. Both A and B
        A, C | C, A | A and C | (A), (C) | AC
        AC | A, C
        A,B,D | A, B, and D
        A and B | B and A
        ABD | ABD
        I and II | II and I
        I, II, III | I, II and III
        12 | B: 12 | (B) 12
        E | E
        b | b
        Graph C | C
    """,
    "numbers": r"""
        1/2 | .5 | 0.50 | 2/4 | one half | ½
        -1/2 | -0.5 | $-\frac{1}{2}$ | \frac{-1}{2} | −½
        3/4 | \dfrac{3}{4} | \tfrac34 | \frac34 | \frac{3}4 | $\cfrac{3}{4}$ | three quarters
        1/3 | 0.3333
        2/3 | 0.666667
        7 | 7.0 | 07 | +7 | seven | Seven
        25 | twenty-five
        -7 | −7 | – 7 | (-7) | negative seven | minus 7 | $-7$
        12.50 | 12.5
        0.5 | 1/2
        0.25 | 25%
        25% | 25 | 0.25 | 25 % | $25\%$ | 25 percent | twenty-five percent | 1/4
        12.5% | 0.125
        33% | 33 per cent
        10 | 10%
        1,234 | 1234 | 1{,}234 | $1{,}234$ | 1 234 | 1,234.0
        12,345,678 | 12345678
        1234.5 | 1,234.5
        5,000 | 5 thousand
        3,000,000 | 3 million
        2.5 million | 2,500,000
        1.2 billion | 1.2 billion
        2 dozen | 24
        3.14 | 3,14
        1.5 × 10^3 | 1500 | 1.5e3 | 1.5 \times 10^{3} | 1.5E3 | 1.5*10^3 | 15 × 10^2
        6.02 × 10^23 | 6.02 \cdot 10^{23}
        2.5 × 10^-3 | 0.0025
        2.5 × 10⁻³ | 2.5 x 10^{-3}
        1024 | 2^{10}
        2^{10} | 1024
        2 1/2 | 5/2 | 2\frac{1}{2} | 2½
        2\frac{3}{4} | 2.75 | 11/4
        -2 1/2 | -2.5
        1 1/4 | 1.25
        5/4 | 1 1/4
        3.0 | 3
        ≈ 3.2 | 3.2
        3.2 | ≈ 3.2 | about 3.2 | approximately 3.2 | approx. 3.2 | roughly 3.2 | x ≈ 3.2 | $\approx 3.2$ | ∼3.2
        8 | 3 + 5 = 8 | x = 3 + 5 = 8
        x = 3 + 5 = 8 | 8
        So AB = 5 + 7 = 12. | 12
        100 | 10^2
    """,
    "formulas": r"""
        8\sqrt{10} | 8√10 | 8√(10) | 8*sqrt(10) | $8 \sqrt {10}$ | \sqrt{640}
        \sqrt{2}/2 | \frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
        \frac{\sqrt{3}}{2} | sqrt(3)/2 | √3/2
        1+\sqrt{2} | √2 + 1
        \sqrt[3]{2} | 2^{1/3}
        4\pi | 4π | 4 pi | 4*pi | π·4
        9\pi cm^2 | 9π
        9π | 9\pi \text{ square units}
        \frac{\pi}{4} | π/4
        \frac{3\pi}{4} | \frac{3}{4}\pi
        2\pi r | 2πr
        e^2 | e^{2}
        e^{16}-1 | -1 + e^16
        \ln 2 | ln(2)
        2\ln 3 | \ln 9
        \log_2 8 | 3
        \sin 30° | \frac{1}{2}
        3+2i | 2i + 3 | 3 + 2i
        2x+3 | 3+2x | 2x + 3
        x^2+2x+1 | (x+1)^2
        x^2 | x²
        \frac{x+2}{7} | \frac{x}{7}+\frac{2}{7}
        3x - 5 | -5 + 3x
        3xy | 3yx
        2(x+1) | 2x+2
        (x-1)(x+2) | (x+2)(x-1)
        \frac{1}{2^{99}} | 2^{-99}
        \frac{1}{2004!} | 1/2004!
        \binom{5}{2} | 10
        |x| | \left|x\right|
        n! | n!
        1 - \frac{1}{e} | 1 - 1/e | 1 - \frac{1}{\mathrm{e}}
        \tan^2 y + 1 | \sec^2 y
        \lg 100 | 2
        \arcsin 1 | \frac{\pi}{2}
        \lceil x \rceil | \lceil x \rceil
        |{-3}| + \sqrt{2} | 3 + \sqrt{2}
        e^{-100} | \frac{1}{e^{100}}
    """,
    "units": r"""
        12 cm | 12 | 12 cm. | 12cm | 12 centimeters | 12 centimetres | 12\,\text{cm} | 12~\mathrm{cm} | $12$ cm
        12 cm | $12 \text{ cm}$
        12 | 12 cm | 12 square units | 12厘米 | 12 in total
        12 m | 12 meters
        5 m | 5m
        12 cm^2 | 12 cm² | 12 sq cm | 12 square centimeters | $12\text{ cm}^2$ | 12 \text{ cm}^{2} | 12
        12 cm^3 | 12 cubic centimeters
        12 m^3 | 12 cubic metres
        12 units | 12 cm
        12 m/s | 12 meters per second | $12\ \mathrm{m/s}$
        60 km/h | 60 km per hour | 60 kilometers per hour
        60 mph | 60 miles per hour
        9.8 m/s^2 | 9.8 m/s²
        5 kg | 5 kilograms | 5
        30 minutes | 30 min
        2 hours | 2 h | 2 hrs | 120 minutes
        1.5 hours | 1 hour 30 minutes | 1 hour and 30 minutes
        3 apples | 3 | 3 Apples
        3 | 3 apples | 3 red apples
        12 years | 12 years old
        25 °C | 25°C | 25 degrees Celsius
        5 feet | 5 ft
        6 inches | 6 in
        5'8" | 5 ft 8 in | 5′8″
        8 L | 8 liters
        12平方厘米 | 12 cm²
        60度 | 60°
        3个 | 3
        60° | 60 degrees | 60º | 60^\circ | $60^{\circ}$ | 60 | π/3
        60 | 60\degree
        45°30' | 45.5 | 45° 30′
        45.5° | 45°30′
        30°15' | 30.25°
        \pi/3 | 60°
        12 total | 12
    """,
    "money": r"""
        $15 | 15 | $15.00 | 15 dollars | \$15 | $\$15$ | 15 USD | 15$
        15 | $15
        15 dollars | $15
        $1,250 | $1250 | 1250
        $2.50 | 2.5
        €20 | 20 euros
        20 | €20
        £5 | 5
        50 cents | $0.50
        $3 million | 3,000,000 | $3,000,000
        15元 | 15
        ¥100 | 100元
    """,
    "lists": r"""
        2, -3 | -3, 2
        2 and -3 | -3 and 2
        2, 3 | 2 and 3 | {2, 3} | \{3, 2\} | x = 2, 3
        x = 2, 3 | 2, 3
        x = 2 or x = -3 | -3, 2 | x = -3, 2 | x = -3 or 2
        x_1 = 2, x_2 = -3 | x = 2 or x = -3 | 2, -3
        ±3 | 3, -3 | x = ±3 | +3 or -3
        x = ±3 | x = 3 or x = -3
        \pm\sqrt{2} | \sqrt{2}, -\sqrt{2}
        1 \pm \sqrt{2} | 1+\sqrt{2}, 1-\sqrt{2}
        1, 2, 3 | 1, 2, and 3 | 3, 2, 1
        \{1, 2, 3\} | {3, 1, 2}
        1;2;3 | 1, 2, 3
        19, 46, and 82 | 82, 19, 46
        1,000 and 2,000 | 1000 and 2000
        3 red, 2 blue | 2 blue, 3 red | 3 red and 2 blue
        9 chickens and 10 rabbits | 10 rabbits and 9 chickens | 9 chickens, 10 rabbits
        red and blue | blue and red
        red, blue | red and blue
        Tom and Ann | Ann and Tom
        1/2, 3/4 | 0.5, 0.75
        (1, 2), (3, 4) | (3, 4), (1, 2)
        (1,2) and (3,4) | (1, 2), (3, 4)
        a=2, b=3 | b=3, a=2 | a = 2 and b = 3
        a = 2, b = 3 | (2, 3)
        2和3 | 2, 3
    """,
    "points": r"""
        (3, 4) | (3,4) | $(3,4)$ | \left(3, 4\right) | (3.0, 4.0) | 3, 4 | x = 3, y = 4 | x=3 and y=4 | P(3, 4)
        (3, 4) | P = (3, 4) | The point is (3, 4) | （3，4）
        P(3, 4) | (3,4)
        (-1/2, 3) | (-0.5, 3)
        (1, 2, 3) | (1,2,3)
        (\sqrt{2}, 1) | (√2, 1)
        \begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
        (x, y) = (3, 4) | (3, 4)
    """,
    "relations": r"""
        x < 3 | x<3 | 3 > x | (-∞, 3) | (-\infty, 3) | x ∈ (-∞, 3)
        x \le 3 | x <= 3 | x ≤ 3 | (-\infty, 3]
        x \ge 3 | [3, \infty) | x is at least 3
        x > 3 | x is greater than 3
        0 < x < 5 | (0, 5) | 5 > x > 0 | x > 0 and x < 5
        0 \le x < 5 | [0, 5)
        [0, 1] | 0 ≤ x ≤ 1
        (0, 12.5) | 0<x<12.5
        [0,1] | [0, 1.0]
        D = (0, 1) | (0, 1)
        x < -1 or x > 1 | (-∞,-1) ∪ (1,∞)
        (-\infty,-1)\cup(1,\infty) | x>1 or x<-1
        x ≠ 2 | x \neq 2
        x != 2 | x ≠ 2
        y = 2x + 1 | y=2x+1 | y = 1 + 2x | 2x - y + 1 = 0 | 2x + 1
        2x + 4y = 3 | y = -x/2 + 3/4
        x^2 + y^2 = 4 | y^2 + x^2 = 4 | x² + y² − 4 = 0
        34x+45y-20z+100=0 | -34x-45y+20z-100=0
        f(x) = x^2 | x^2 | f(x)=x²
        3 | x = 3
        x = 3 | 3 | x=3 | x is 3 | 3 = x
        AB = 5 | 5 | AB = 5 cm
        5 | AB = 5
        \angle A = 60° | 60°
        ∠A = 60° | ∠A=60
        S_{ABC} = 12 | 12
    """,
    "ratios": r"""
        2:3 | 2 : 3 | 4:6 | 2/3 | 2 to 3 | \frac{2}{3}
        2/3 | 2:3
        1:2:3 | 2:4:6
        AB:BC = 2:3 | 2:3
        1:\sqrt{3} | 1:√3
        $2:3$ | 2：3
    """,
    "times": r"""
        3:45 | 3:45
        3:45 PM | 3:45pm | 3:45 p.m. | 15:45 | 3:45
        15:45 | 3:45 PM
        9:05 | 09:05
        3:00 | 3 o'clock
        3 PM | 3:00 PM
        12:00 | 12:00.
    """,
    "yes and no": r"""
        Yes | yes | Yes. | YES! | Yes, they are equal. | Yes, because the angles are equal. | Yes - they are equal
        Yes | Yes, there is no other way
        No | No, it is not. | No. The sides differ. | no | No it is not
        Yes, they are parallel | Yes
        True | true
        False | False. | False, because 3 > 2
    """,
    "text": r"""
        red | Red | RED. | "red" | the red
        red cube | Red Cube
        a red cube | the red cube
        rhombus | A rhombus | It is a rhombus.
        Paris | paris
        July 4, 1976 | july 4, 1976
        well-known | Well-known.
        New York | new  york
        Smith & Sons | Smith&Sons
        SAS | (SAS)
        Room 12B | room 12b
        parallel | parallel.
        等腰三角形 | 等腰三角形。
        straße | STRASSE
        none | None
        the equator | equator
    """,
    "solutions": r"""
        <answer> 3 </answer> | 3
        <think>1+2</think><answer>3</answer> | 3
        <think>The answer is 5</think> <answer>B</answer> | B
        We have 2+2=4. #### 4 | 4
        \boxed{7} | 7
        The side is 5, so the area is \boxed{25}. | 25
        First \boxed{3}, then the rest, so the result is \boxed{9}. | 9
        The roots are \boxed{2} and \boxed{3}. | 2, 3
        It is a square. Answer: 16 | 16
        3 | <answer>3</answer> | <think>2+1</think><answer>3</answer>
        25 | The area is \boxed{25}. | The side is 5, so the area is \boxed{25}. | \boxed{25}
        The area is 5 * 4 = 20. | 20
        The side is 5. The area is 25. | 25
        We get x = 4, so the area is 16. | 16
        So the perimeter is 2(3+4) = 14 cm. | 14
        Hence, AB = 5. | 5
        He lives in St. Louis | He lives in St. Louis
        \boxed{12\text{ cm}} | 12
        \boxed{\frac{1}{2}} | 0.5
    """,
    "reasons": r"""
        12 | 12, because 3*4 = 12 | 12 because the side is 4 | 12 (because 3*4 = 12) | 12, since the side is 4
        12 | 12, as shown above | 12, which is the area
        red | red, because it is hot
    """,
    "more": r"""
        m \geq \sqrt{2} | m \in [\sqrt{2}, +\infty)
        13 | \text{13}
        73 | ✅ Final Answer: **73**
        B | **B | B选项 | <B> | Option b: 12 | The correct option: B | The right one is B
        60° | 60^o | 60 deg
        12 | 12 u^2 | 12 units^2 | = 12 cm | The value of x is 12.
        3 \times 10^8 | 3*10**8 | 300,000,000
        3.14 | 3.14... | around 3.14
        red | (red) | red...
        triangle ABC | △ABC
        ∠ABC | angle ABC
        (x, y) = (1, 2) | x = 1, y = 2
        B, C | both B and C
        b < a | a > b
        A > B > C | C < B < A
        1 km | 1000 m
        28 | 28%
        5 | 5%
        sqrt3 | \sqrt{3}
        8 sqrt 10 | 8\sqrt{10}
        US$15 | 15
        pi | π
        -3 | -3.0
        p=5,q=2;p=7,q=2 | (5,2),(7,2)
        V_{1}:V_{2}=11:21 | 11:21
        32349 | 32,\!349
        x = 5 | $x$ is $5$ | x is about 5 | x is approximately equal to 5
        The probability is 1/2. | 0.5
        45 | The measure of angle A is 45 degrees.
        x = 12 | The value of x is 12.
        20 cm | The perimeter is 20 cm.
        (2, 0) and (-2, 0) | (±2, 0)
        9 chickens and 10 rabbits | 9, 10 | 9 and 10
        2^3 * 5 | 5 * 2^3
        7 to 8 | 7 to 8
        60 cm - 20 cm = 40 cm | 40 cm
        40 | 60 cm - 20 cm = 40 cm
        5 ft | 5'
        (3, 4) | \langle 3, 4 \rangle
        (-\infty, \infty) | all real numbers
        3/5 | 3 out of 5
        A = πr^2 | \pi r^2
        \frac{4}{3}\pi r^3 | 4/3 π r^3
        y = mx + b | y = b + mx
        -3 < x | x > -3
        60% | 3/5
        The total is 3 + 4 = 7 apples | 7
        16 | x = 4, so the area is 16
        5 (five) | 5
        1/3 | 33.33%
        1.41 | √2 ≈ 1.41
        \sqrt{2} | √2 ≈ 1.41
        B = 5 - A | A + B = 5
    """,
    "repeating decimals": r"""
        0.\overline{3} | 1/3 | \frac13 | 0.\bar{3} | 0.\dot{3}
        0.1\overline{6} | 1/6
        -2.\overline{3} | -7/3
    """,
    "matrices and sets": r"""
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | [[1, 2], [3, 4]] | \begin{bmatrix}1&2\\3&4\end{bmatrix}
        \begin{pmatrix} 1 & 2 & 3 \end{pmatrix} | (1, 2, 3)
        \{1,3\} \cup \{2,4\} | \{1,2,3,4\}
        {1, 2} ∪ {2} | {1, 2}
        \{x|x>2\} | x > 2 | (2, ∞)
        \emptyset | {} | the empty set
        (-\infty, \infty) | \mathbb{R}
        |x| < 2 | -2 < x < 2 | (-2, 2)
        52_8 | 52_{8}
        \left\{\begin{array}{l} x=2 \\ y=3 \end{array}\right. | x=2, y=3
    """,
    "names": r"""
        A(1, 2) | (1, 2) | A = (1, 2) | point A is (1, 2) | The coordinates of A are (1, 2)
        A(1, 2), B(3, 4) | B(3, 4), A(1, 2)
        △ABC ∼ △DEF | \triangle ABC \sim \triangle DEF | △ABC ~ △DEF
        blue | The color is blue.
        Paris | The capital of France is Paris.
        True | The statement is true.
        third floor | 3rd floor
        May 5, 2020 | May 5th, 2020 | 5 May 2020 | 5th of May, 2020
        Monday | On Monday
        The shape is a cylinder. | cylinder | a cylinder
        cannot be determined | It cannot be determined.
        U.S. | US
        mgh | m g h
        AB ∥ CD | AB // CD
        6 | S△ABC = 6 | tan∠ABC = 6
        \log_2 3 | log₂3
        3a^2b - 2ab | ab(3a-2)
        ice cream | Ice-cream
    """,
    "what surrounds a number": r"""
        10 | There are 10 objects in the image. | 10 students in the class | 10 left | exactly 10 | a total of 10
        10 | ✅ 10 | 10 ✓ | I got 10. | x must be 10 | 2 apples + 8 apples = 10 apples
        10 | 10, obtained by adding 2 and 8 | 10 (approximately)
        12 houses on the left | 12 houses | 12
        2008 | In 2008 | the year 2008
        4 | 4 times | → 4 | => 4 | She bought 4 apples. | Since 2+2=4, we get 4
        60° | The measure of ∠ABC is 60°.
        40°20' | 40 degrees 20 minutes
        12 | a dozen
        1000 | a thousand
        30 minutes | half an hour
        0.5 A | 500 mA | 0.5 amperes
        3 mol | 3 moles
        Rs. 500 | 500 | 500 rupees
        9.8 m/s^2 | 9.8 \frac{m}{s^2}
    """,
    "Chinese": r"""
        6 | 共6个 | 面积为6 | x等于6 | x的值是6 | 综上所述，答案是 6。
        30° | ∠A为30° | ∠A的度数为30°
        B | 【答案】B | B，因为角相等 | B 项正确
        是 | 是的
        等腰三角形 | 是等腰三角形
        ①③ | ①、③ | ① and ③
        a ≤ -1 或 a ≥ 3 | a ≤ -1 or a ≥ 3 | (-∞, -1] ∪ [3, ∞)
    """,
}
WRONG = {
    "parts": r"""
        8\sqrt{10} | 8 | 10 | \sqrt{10}
        10 | 8\sqrt{10}
        \sqrt{3} | 3
        3 | \sqrt{3}
        4\pi | 4 | π
        4 | 4\pi
        \frac{1}{2} | 1 | 2
        \frac{\sqrt{3}}{2} | \frac{3}{2} | 2
        2x+3 | 3 | 2x
        2x | x | 2
        x^2 | x | 2
        e^2 | e
        2^{10} | 2 | 10 | 20
        3+2i | 3 | 2
        1 + \sqrt{2} | \sqrt{2}
        12 cm^2 | 2
        2 | 12 cm^2
        12.5 | 12 | 5
        1,234 | 234 | 1
        234 | 1,234
        1.5 × 10^3 | 1.5 | 10^3 | 3
        45°30' | 45 | 30
        2 1/2 | 2 | 1/2
        1/2 | 2 1/2
        3:45 | 45
        1:2 | 2
        (3, 4) | 3 | 4
        \sin 30° | 30
        \log_2 8 | 2
        2.5 million | 2.5
        A4 | 4 | A
        x = 12 | 1
        July 4, 1976 | 4 | 1976
        2019-2020 | 2020
    """,
    "lists": r"""
        2, 3 | 2 | 3 | 2, 3, 4 | 2, 4
        2 | 2, 3 | 2 and 3 | 2 or 3 | 1, 2, 3 | 1 2 3
        x = 2 or x = -3 | x = 2 | x = -2 or x = 3
        x = 5 | x = 5 or x = -5
        ±3 | 3 | -3
        3 | ±3
        \pm\sqrt{2} | \sqrt{2}
        1, 2, 3 | 1, 2 | 2, 3, 4
        {1, 2} | {1, 3}
        19, 46, and 82 | 21, 36, and 82
        n=2, 3, 4 | n=1, 2, 3
        3 red, 2 blue | 2 red, 3 blue | 3 red | 3 red, 2 green
        9 chickens and 10 rabbits | 9 | 19 | 9 chickens
        red and blue | red | red and green
        a=2, b=3 | a=3, b=2 | 3, 2
        1, 2, \ldots, n | 1, 3, 5, \ldots, 2n-1
        (1,2), (3,4) | (1,2) | (2,1), (4,3)
        1331 and 1728 | 1331
        2, 2 | 2
    """,
    "points": r"""
        (3, 4) | (4, 3) | 4, 3 | (3, -4) | (3, 4, 5) | 3/4 | 3:4 | x = 4, y = 3 | 7
        A(3, 4) | B(4, 3)
        (1, 2, 3) | (1, 2) | (3, 2, 1)
    """,
    "signs": r"""
        -5 | 5
        5 | -5 | −5 | minus 5
        3+2i | 3-2i
        1 - \sqrt{2} | 1 + \sqrt{2}
        1 - \frac{1}{e} | 1 + \frac{1}{e}
        10^{-3} | 10^{3}
        x = -3 | x = 3
        2x - 3 | 2x + 3
        -x | x
        (-1, 2) | (1, -2)
        -3/4 | 3/4
        y = 2x + 1 | y = 2x - 1
        -(-5) | -5
    """,
    "relations": r"""
        x < 3 | x > 3 | x ≤ 3 | x = 3 | 3 | y < 3 | x < 4
        x \ge 3 | x > 3 | 3
        x ≠ 2 | x = 2 | 2
        x = 2 | x ≠ 2
        3 | x > 3 | x < 3 | at least 3 | more than 3 | less than 3 | ≥ 3 | x = x | 2x = 6
        [0, 3] | (0, 3) | [0, 4] | 3
        (0, 3) | [0, 3] | 0 ≤ x ≤ 3
        [0, 3) | (0, 3]
        (-\infty, 3) | x > 3 | (3, \infty)
        0 < x < 5 | 0 < x < 6
        5 | [4, 6] | 4 < x < 6 | (4, 6) | between 4 and 6 | 4 to 6 | 4-6
        D = (0, 1) | D = (0, 1.5)
        x<-1 or x>1 | -1<x<1
        y = 2x + 1 | y = 2x | y = 3x + 1
        3x - y + 13 = 0 | 3x + y + 13 = 0
        x^2 + y^2 = 4 | x^2 + y^2 = 2 | x^2 - y^2 = 4
        2x + 4y = 3 | 2x + 4y = 4
        x = 3 | x = x | y = 3
        AB = 5 | BC = 5
        ∠A = 60° | ∠B = 60°
        f(2) = 5 | f(3) = 5
    """,
    "units": r"""
        12 cm | 12 m | 12 cm^2 | 12 mm | 12 kg | 12 inches
        12 cm^2 | 12 cm^3 | 12 cm
        12 m/s | 12 km/h | 12 m | 12 m/s^2
        60 km/h | 60 mph
        2 hours | 2 days | 2 seconds
        30 minutes | 30 hours
        3 apples | 3 oranges | 4 apples
        5 kg | 5 g | 5 lb
        25 °C | 25 °F
        60° | 60' | 60 radians | 61° | π/6
        45°30' | 45.3°
        5 feet | 5 inches
        5'8" | 5'9" | 6'8"
        28% | 28 cm
        12 square units | 12 cubic units
        3 million | 3 billion
        3 thousand | 3
    """,
    "money": r"""
        $15 | $16 | $1.5 | 15 cents | €15 | 15% | $150
        $2.50 | $2.05
        50 cents | $50
        $1,250 | $1
        $3 million | $3
    """,
    "numbers": r"""
        1000 | 1.000
        1,000 | 10,00
        12,345 | 12
        12 | 12,345 | 1 2
        1/2 | 1/3 | 0.2
        1/3 | 0.3 | 0.34
        2/3 | 0.67
        5 | 5.1 | 5.01 | 50 | 55 | 5e3 | 5^2 | 15 - 10 | 2 + 3 | 10/3
        6 | 2*3 | 2 \times 3 | 3! | 2(3)
        4 | \sqrt{16}
        28% | 2.8 | 72% | 0.028
        0.28 | 28
        28/100 | 28
        10 | 4 10/3
        11 | 11 6/6
        2 1/2 | 21/2
        1.5 × 10^3 | 1.5 × 10^4 | 1.5 × 10^{-3} | 153
        3.14 | 3.15 | 314
        0.5 | .05
        \frac{1}{2^{99}} | \frac{1}{2^{98}}
        \frac{1}{2004!} | \frac{1}{2006!}
        \frac{2^{2005}+1}{3 \cdot 2^{2006}} | \frac{1}{3 \cdot 2^{2006}}
        2^{10} | 10^2
        12:00 | 1:00
        2 | 1=2=3
        seven | 8
        3 | 3 out of 5 | 3 of 5 | 1 3
    """,
    "formulas": r"""
        8\sqrt{10} | 8\sqrt{5} | 10\sqrt{8}
        \sqrt{2} | \sqrt{3}
        \sqrt[3]{2} | \sqrt{2}
        4\pi | 6\pi | 12.56
        2x | 2y | 3x | x^2
        x^2+1 | x^2
        x^2+2x+1 | x^2+1
        \frac{x}{2} | \frac{2}{x}
        \sin x | \cos x
        e^2 | e^3
        \ln 2 | \log_2 10
        3xy | 3x
        A4 | A5 | 4A
        n! | n
        |x| | x
        ab | a+b
        F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1} | F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}
        e^{-100} | e^{-101}
        \arcsin 1 | \arccos 1
    """,
    "ratios and times": r"""
        2:3 | 3:2 | 2 | 3 | 2:3:4 | 3/2
        1:2:3 | 1:4:9
        1:2:3:\ldots | 1:4:9:\ldots
        3 | 3:4
        1:2 | 1:3
        1:3 | 1:2
        3:45 | 3:46 | 4:45
        3:45 PM | 3:45 AM
        15:45 | 3:45 AM
        1:30 | 2:30
        9:05 | 9:50
    """,
    "choices": r"""
        B | C | (C) 12 | A, B | A or B | B or C | B and C | A B C D | (A) (B) (C) (D) | A/B/C/D | not B
        B | B: 60 or C: 90 | B: 60, C: 90 | A: 12 B: 13 | 12 | Bob | AB | b2 | B = 3 | A triangle has three sides
        A | A triangle has three sides | A cat | All of them
        I | I think so
        C | The figure shows C and D | \boxed{A} \boxed{B} \boxed{C} \boxed{D}
        A, C | A | A, B | A, B, C
        A and C | C
        AC | A
        (B) 12 | C | 13 | (C) 12
        C: 58° | 59° | D: 58°
        12 | C
        D. Both A and B | A | A and B or C
        E | F
        I and II | I | I and III
    """,
    "text": r"""
        red | blue | not red | red or blue | reddish
        red cube | red cubes | cube | blue cube
        isosceles triangle | triangle | isosceles
        July 4, 1976 | July 4, 1977 | July 5, 1976
        Room 12B | Room 12C | 12
        2019-2020 | 2018-2020
        1st quarter of 2019 | 2nd quarter of 2019
        Yes | No | Not sure | Yes and no | Yes or no | Maybe
        No | Yes, it is. | None | No one knows | | Nothing
        No solution | No
        True | False | It is not true
        St. Louis | St. Paul
        The sky is blue | The grass is blue
        north | northeast
        Tom and Ann | Tom
        parallel | not parallel
        北京 | 上海
        等腰三角形 | 三角形
    """,
    "guesses": r"""
        25 | 5
        7 | 3 + 4 = 7 or 8 | 7 (or 8) | 6, 7, 8 | 6 or 7 | \boxed{6} \boxed{7} | \boxed{6} or \boxed{7} | $6$ $7$
        7 | The answer is not 7 | I do not think the answer is 7 | either 6 or 7 | 7?8 | about 6 to 8 | 7 or so or 8
        3 | There are 3 red and 4 blue | 3 times x | 3 more than x | 3 less than 7 | 3 halves
    """,
    "solutions": r"""
        <answer> 3 </answer> | 4
        <think>5</think><answer>3</answer> | 5
        We have 2+2=4. #### 4 | 2
        The side is 5, so the area is \boxed{25}. | 5
        So x = 3 + 4 = 7. | 3 | 4 | 3 + 4
        3 | <think>3</think><answer>4</answer> | <answer>3</answer> <answer>4</answer>
        25 | The area is \boxed{5}.
        The area is 5 * 4 = 20. | 5
        The side is 5. The area is 25. | 5
        We get x = 4, so the area is 16. | 4
    """,
    "more": r"""
        5 May | 5
        5 PM | 5 AM
        5 | 5K | 5k | 5 dozen | 5! | |-5| | 5i | It is false that x = 5 | It isn't 5 | 5 is not the answer
        5 | The answer is not \boxed{5} | \boxed{5} is wrong | 10 objects | 5 objects is wrong | 5 in the box is wrong
        8:00 AM | 9:00 AM | 8:00 PM
        U.S. | U
        mgh | mg
        5 | x is not 5 | the answer is less than 5 | the answer is between 4 and 6 | 5 below zero | 5 tens
        5 | half of 10
        2 | log 100 | 2πr
        1970s | 1970
        May 5 | May 6
        No. 5 | No
        0.28 | 0.28%
        a < b | b < a
        A > B > C | A > C > B
        f(x) = 2x | g(x) = 2x
        P(A) = 0.5 | P(B) = 0.5
        x = 1, y = 2 | x = 2, y = 1
        3rd | 3
        2nd | 2
        Figure 2 | 2
        1 | one-third | 0.999 | 0.9999
        12 | 12:00
        10 | 10.000.000 | 1 0
        3 feet 4 inches | 3 feet
        1 hour 30 minutes | 1 hour
        The perimeter is 20 cm. | The area is 20 cm.
        20 | The perimeter is not 20
        B | Option A or B | A. B
        7 | 7 - 8 | 7/8 | 7 8 | 7,8 | 7;8 | 7|8 | 7 & 8 | [6, 8] | 7 ± 1 | 8 - 1 = 7 or 6 | x = 7, y = 8
        7 | x = 7 or 8 | 7%8 | 7 mod 8 | 6 < x < 8 | ~7-8 | 7 to 8
        red | red, blue | red and blue | red/blue
        9 chickens and 10 rabbits | 10, 9
        2019-2020 | 2020-2021 | 2018-2019
        4 to 6 | 2 to 3
        3 | 3xy | 3yx | √2 ≈ 3 | 3 ≈ 4
        x < 3 | 3 more than x
        A and B | A or B
        red and blue | red or blue
        x = 7 or 8 | x = 7, y = 8
        π/3 | 60'
        5 apples | apples
        AB | A
        x^2 | 2x
        \frac{a}{b} | \frac{b}{a}
        x_1 | x_2
        a_n | a_{n+1}
        (-\infty, \infty) | (0, \infty)
        16 | x = 16, so the area is 4
        12:30 | 12.5
        \sqrt{2} | √2 ≈ 3
        101 | 100 ≈ 101
    """,
    "repeating decimals": r"""
        0.\overline{3} | 0.3
        0.\overline{12} | 0.12 | 0.1\overline{2}
        0.3 repeating | 0.3
    """,
    "matrices and sets": r"""
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix} | (1, 2, 3, 4)
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | [[2, 1], [3, 4]] | [[3, 4], [1, 2]]
        \{1,3\} \cup \{2,4\} | \{1,2,3\}
        (0,1) \cup (2,3) | \{0,1,2,3\}
        \emptyset | {0} | 0
        |x| < 2 | x < 2 | |x| ≤ 2
        52_8 | 52_9 | 528
        \left\{\begin{array}{l} x=2 \\ y=3 \end{array}\right. | x=3, y=2
    """,
    "names": r"""
        A(1, 2) | B(1, 2) | A'(1, 2)
        △ABC ≅ △DEF | △ABC ∼ △DEF
        x' | x
        blue | The color is not blue | The color is blue or red
        True | The statement is false.
        third floor | 3 floors
        May 5, 2020 | May 6, 2020 | May 5, 2021 | June 5, 2020
        B | (B) is wrong | B) is not correct | (B) 12 is wrong
        parallel | The lines are not parallel.
        S△ABC = 6 | S△ABD = 6
        sin∠A = 0.6 | cos∠A = 0.6
    """,
    "what surrounds a number": r"""
        12 houses on the left | 12 houses on the right
        10 | 10 objects not in the image | There are 10 objects in the image, or 11. | 2 apples + 8 apples | in 10 or 11
        3 left | 3 right
        4 times | 5 times
    """,
    "Chinese": r"""
        6 | 面积不为6 | x不等于6 | 6不对 | 6或7 | x=6是错误的
        ∠A为30° | ∠B为30°
        B | B项错误 | 不是B
        等腰三角形 | 不是等腰三角形
        ①③ | ①② | ① | 13
        a ≤ -1 或 a ≥ 3 | -1 ≤ a ≤ 3 | a ≤ -1
    """,
}
